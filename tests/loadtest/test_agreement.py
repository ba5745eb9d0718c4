"""`lvnas loadtest` and `vllm bench serve` against the same server."""

import importlib.util
from pathlib import Path

import pytest

from lvnas_loadtest.run import run
from lvnas_loadtest.workload import Workload

SCRIPT = Path(__file__).parents[2] / "benchmarks/loadtest/agreement.py"


@pytest.mark.full
def test_same_numbers_as_vllm_bench_serve(priority, serve, tmp_path):
    """Throughput within 5%, median TTFT and TPOT within 10%, on a server whose delays do not depend on the client."""
    pytest.importorskip("vllm.benchmarks.serve")
    from lvnas.bases.tiny_processor import build_processor, save_processor

    save_processor(build_processor([], tile=32, max_tiles=2), tmp_path / "tokenizer")
    (tmp_path / "tokenizer/config.json").write_text('{"model_type": "mllama"}')
    spec = importlib.util.spec_from_file_location("agreement", SCRIPT)
    assert spec and spec.loader
    agreement = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agreement)
    # `vllm bench serve` takes the chunk with the role for the first token; vLLM sends the two together. After an SSE
    # comment (our ": ping", which vLLM does not send) it can lose a whole answer: late_role sends none.
    model = {"ttft": [0.1, 0.15, 0.3], "gap": [0.02, 0.03], "late_role": True}
    server = serve({"a": model, "b": model})
    load = Workload(
        url=server.url, adapters=["a", "b"], users=4, requests=60, popularity="distinct", image_share=0.0,
        output_tokens="16",
    )  # fmt: skip
    ours = run(load, tmp_path / "ours")
    theirs = agreement.vllm_bench(load, str(tmp_path / "tokenizer"), tmp_path)
    assert theirs["completed"] == ours["completed"] == 60
    for name in ("total_input_tokens", "total_output_tokens"):
        assert ours[name] == theirs[name]
    for name in ("output_throughput", "request_throughput"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.05)
    for name in ("median_ttft_ms", "median_tpot_ms", "median_e2el_ms"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.10)
