"""A block's step: one torch optimizer stepped block by block, clipping, and what AdamW steps by."""
