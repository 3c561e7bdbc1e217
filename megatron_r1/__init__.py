"""DeepSeek-R1's training on Megatron-Core and vLLM."""
