"""The adapters of the session's engine: every kind of target and rank."""

import os

EVERYTHING = r".*(vision_model|language_model).*\.([qkvo]_proj|gate_proj|up_proj|down_proj|fc1|fc2)"
VISION = r"model\.vision_model.*\.([qkvo]_proj|fc1|fc2)"
CROSS_KV = r".*cross_attn\.[kv]_proj"
MIXED = {
    "": 4,
    r"^model\.vision_model\.transformer\.layers\.0\.self_attn\.q_proj": 16,
    r"^model\.vision_model\.global_transformer\.layers\.0\.self_attn\.q_proj": 1,
    r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 8,
    r"^model\.language_model\.layers\.1\.cross_attn\.k_proj": 2,
    r"^model\.language_model\.layers\.1\.cross_attn\.v_proj": 16,
    "gate_proj": 13,
    "fc1": 3,
}
ADAPTERS = {
    "everything": {"ranks": MIXED, "targets": EVERYTHING},
    "everything-too": {"ranks": {"": 16}, "targets": EVERYTHING, "scale": 0.5},
    "text-only": {
        "ranks": {"": 8},
        "targets": r".*language_model.*\.([qo]_proj|down_proj)",
        "use_rslora": True,
    },
    "vision-1": {"ranks": {"": 8}, "targets": VISION},
    "vision-2": {"ranks": {"": 8}, "targets": VISION},
    "cross-kv-1": {"ranks": {"": 4}, "targets": CROSS_KV},
    "cross-kv-2": {"ranks": {"": 4}, "targets": CROSS_KV},
    "projector": {"ranks": {"": 4}, "targets": r".*(multi_modal_projector|cross_attn\.[qo]_proj)"},
}
DTYPE = os.environ.get("LVNAS_TEST_DTYPE", "float32")
"""Precision of the session's engine; the oracle stays in float32."""
