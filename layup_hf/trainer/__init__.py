"""All that knows the Trainer of transformers; no other folder does."""
