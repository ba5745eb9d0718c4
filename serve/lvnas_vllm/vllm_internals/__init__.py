"""Every touch of a name that vLLM does not promise to keep; test_vllm_internals.py guards each."""
