"""Trainable LIME in its general form: the user defines perturbations, weights and interpretable representations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import captum.attr as captum
import torch
from torch import Tensor

from captum_idexpo._core.captum import (
    NullProgress,
    TargetType,
    expand_additional_forward_args,
    expand_target,
    progress,
    reduce_list,
)
from captum_idexpo._core.errors import warn
from captum_idexpo.attr._graph import by_outputs
from captum_idexpo.attr._perturbation import Samples
from captum_idexpo.attr._trainable import logged
from captum_idexpo.attr.surrogates import Surrogate, as_surrogate


class LimeBase(captum.LimeBase):
    """LIME with perturbed inputs that the user's function makes, as `captum.attr.LimeBase`.

    Args:
        forward_func: takes the inputs and the additional arguments, returns one value per perturbed input.
        interpretable_model: the surrogate, one of `captum_idexpo.attr.surrogates` or a Captum model. Captum's
            scikit-learn models have a graph, too. Other models have none.
        similarity_func: (inputs, perturbed inputs, interpretable representation, ``**kwargs``) -> the weight.
        perturb_func: (inputs, ``**kwargs``) -> a perturbed input, or its interpretable representation. It may also
            return a generator of these.
        perturb_interpretable_space: True if perturb_func returns a representation.
        from_interp_rep_transform: (representation, inputs, ``**kwargs``) -> the perturbed input.
        to_interp_rep_transform: (perturbed input, inputs, ``**kwargs``) -> the representation ``(1, D)``.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LimeBase
        >>> from captum_idexpo.attr.surrogates import Ridge
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(1, 3)
        >>> lime = LimeBase(
        ...     model,
        ...     Ridge(alpha=1e-6),
        ...     similarity_func=lambda x, perturbed, mask, **_: 1.0,
        ...     perturb_func=lambda x, **_: torch.bernoulli(torch.full_like(x, 0.5)),
        ...     perturb_interpretable_space=True,
        ...     from_interp_rep_transform=lambda mask, x, **_: mask * x,
        ...     to_interp_rep_transform=None,
        ... )
        >>> coefficients = lime.attribute(x, target=1, n_samples=100, create_graph=True)
        >>> torch.allclose(coefficients, x * model.weight[1], atol=1e-4)
        True
        >>> coefficients.sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        n_samples: int = 50,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        *,
        create_graph: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Return the coefficients of the surrogate fitted to the outputs on perturbed inputs.

        Args:
            inputs: a tensor or a tuple of tensors, passed to perturb_func.
            target: int, tensor (B,) or list: the output index to explain; None if there is one output per row.
            additional_forward_args: passed to the forward function after the perturbed inputs.
            n_samples: number of perturbed inputs.
            perturbations_per_eval: perturbed inputs that are concatenated for one forward pass.
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the coefficients to the graph of the forward function; else they are detached.
            kwargs: passed to the user's functions.

        Returns:
            Coefficients ``(1, D)``. The dtype is that of the outputs, at least float32.

        Raises:
            RuntimeError: create_graph where no graph can exist, or with an interpretable model that has no graph.
            ValueError: n_samples or perturbations_per_eval is below 1.
            AssertionError: as Captum, if there is not one output per perturbed input.
        """
        if n_samples < 1 or perturbations_per_eval < 1:
            raise ValueError(
                "n_samples and perturbations_per_eval must be at least 1, given: "
                f"{n_samples} and {perturbations_per_eval}."
            )
        surrogate = as_surrogate(self.interpretable_model)
        arguments: dict[str, Any] = {
            "target": target,
            "additional_forward_args": additional_forward_args,
            "n_samples": n_samples,
            "perturbations_per_eval": perturbations_per_eval,
            "show_progress": show_progress,
        }
        if surrogate is not None:
            compute = partial(self._explain, surrogate=surrogate, keywords=kwargs, **arguments)
        elif not create_graph:
            compute = partial(super().attribute.__wrapped__, self, **arguments, **kwargs)
        else:
            raise RuntimeError(
                f"The interpretable model {self.interpretable_model!r} is fitted by code that has no gradient: use one "
                "of captum_idexpo.attr.surrogates, or leave create_graph out."
            )
        coefficients: Tensor = by_outputs(self, compute, inputs, create_graph)
        return coefficients

    def _explain(
        self,
        inputs: Any,
        surrogate: Surrogate,
        keywords: dict[str, Any],
        target: TargetType,
        additional_forward_args: object | None,
        n_samples: int,
        perturbations_per_eval: int,
        show_progress: bool,
    ) -> Tensor:
        device = (inputs if isinstance(inputs, Tensor) else inputs[0]).device
        draw = self._get_perturb_generator_func(inputs, **keywords)
        representations: list[Tensor] = []
        weights: list[Tensor] = []
        outputs: list[Tensor] = []
        bar_class = progress if show_progress else NullProgress
        total = math.ceil(n_samples / perturbations_per_eval)
        with bar_class(total=total, desc=f"{self.get_name()} attribution") as bar:
            for start in range(0, n_samples, perturbations_per_eval):
                chunk = []
                for _ in range(min(perturbations_per_eval, n_samples - start)):
                    try:
                        representation, perturbed = draw()
                    except StopIteration:
                        warn("Generator completed prior to given n_samples iterations!")
                        break
                    weight = self.similarity_func(inputs, perturbed, representation, **keywords)
                    representations.append(representation)
                    weights.append(torch.as_tensor(weight, device=device).flatten())
                    chunk.append(perturbed)
                if not chunk:
                    break
                outputs.append(self._outputs(chunk, target, additional_forward_args, device))
                bar.update()
        values = torch.cat(outputs)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        samples = Samples(torch.cat(representations)[None].to(values.dtype), torch.cat(weights)[None].to(values.dtype))
        return samples.fit(surrogate, values[None])

    def _outputs(self, perturbed: list[Any], target: TargetType, arguments: Any, device: torch.device) -> Tensor:
        n_copies = len(perturbed)
        values: Tensor = self._evaluate_batch(
            [reduce_list(perturbed)] if n_copies == 1 else perturbed,
            expand_target(target, n_copies),
            expand_additional_forward_args(arguments, n_copies) if arguments is not None else None,
            device,
        )
        return values
