"""A second oracle: what is true of right values, over all classes and a zoo of models.

Finite differences check a gradient. They cannot see that the value is wrong, whose gradient is exact, too. Here values
are checked by completeness, and by changes of a call that must not change the result.
"""
