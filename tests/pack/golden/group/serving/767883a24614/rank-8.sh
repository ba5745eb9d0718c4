#!/bin/sh
# The engine of group rank-8; more options of vLLM can follow, such as --port 8001
cd "$(dirname "$0")/../.." || exit 1
exec vllm serve example/tiny-base --enable-lora --max-loras 1 --max-lora-rank 8 --max-cpu-loras 1 \
  --lora-modules digits=adapters/digits-87184515be77 "$@"
