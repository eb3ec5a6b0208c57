"""What a block's step does to one number of it: written once, for every device.

Only operators are used, so that the functions take whatever has them: tensors in tests, values of the code that
`native.py` generates, and what `on_cuda.py` has in its kernel (Triton takes no names of types).
"""


def towards(value, other, share):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """`value`, moved by a share of the way to `other`: a merge, or a running mean."""
    return value + share * (other - value)


def stepped(value, ahead, root, length, rate, decay, root_scale, epsilon):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """AdamW's step (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        value: The parameter.
        ahead: What is stepped by; see `layup_hf.optim.direction.Direction`.
        root: Of the second moment.
        length: By what the step is longer.
        rate: Learning rate, with the correction for the beginning of the first moment.
        decay: `1 - learning rate * weight decay`.
        root_scale: Correction of `root` for the beginning of the second moment.
        epsilon: AdamW's.
    """
    return value * decay - (length * rate) * ahead / (root * root_scale + epsilon)
