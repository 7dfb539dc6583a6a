"""The package's own exception."""


class NonFiniteError(FloatingPointError, ValueError):
    """NaN or infinity where a number is needed: in inputs, in attributions, in a model's outputs or in a loss."""
