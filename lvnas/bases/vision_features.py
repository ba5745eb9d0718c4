"""Which vision features the language model sees: Meta's reference, or what the installed transformers computes.

The projector's input is the vision encoder's last state beside the states of `intermediate_layers_indices`. Meta's
reference (and transformers up to 4.53) takes the *input* of layer i; transformers 5 takes its *output*, off by one
against the released weights.
"""

from typing import Any

from torch import nn

from lvnas.errors import unknown

VISION_FEATURES = ("reference", "transformers")


def set_vision_features(model: nn.Module, features: str = "reference") -> nn.Module:
    """Makes every Mllama vision encoder in `model` compute `features`; other models stay as they are.

    Raises:
        InputError: `features` is not one of VISION_FEATURES.
    """
    if features not in VISION_FEATURES:
        raise unknown("vision features", features, VISION_FEATURES)
    module: Any
    for module in model.modules():
        if type(module).__name__ == "MllamaVisionModel":
            if handle := module.__dict__.pop("_lvnas_reference_hook", None):
                handle.remove()
            if features == "reference":
                hook = module.transformer.register_forward_hook(_layer_inputs, with_kwargs=True)
                module.__dict__["_lvnas_reference_hook"] = hook
    return model


def _layer_inputs(encoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Replaces the recorded outputs of the layers by their inputs: the same states, one place later."""
    first = args[0] if args else kwargs["hidden_states"]
    if output.hidden_states[0] is not first:
        output.hidden_states = (first, *output.hidden_states[: len(encoder.layers) - 1])
    return output
