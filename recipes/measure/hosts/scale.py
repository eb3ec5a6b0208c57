"""How many bytes a step produces per second of computation, which is what a link has to carry."""

GPT2_BYTES_PER_SECOND = 498e6 / 0.58
"""Of gradients, by GPT-2 124M in fp32 on one A100: nanoGPT's published run."""
