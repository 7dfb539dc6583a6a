"""The page of all attributions: what each is for, what it costs, whether it can be trained. A test keeps it true."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GENTLE = "exact"
KINKS = "exact away from ReLU's kinks"


@dataclass(frozen=True)
class Entry:
    """An attribution of Captum's, as this package offers it.

    `cost`: forward rows an example, an expression in D (features), W (windows), K (baselines given) and the arguments.
    """

    name: str
    purpose: str
    cost: str
    takes_gradients: bool
    numbers: str = "Captum's"
    gradient: str = GENTLE


OFFERED = {
    "Gradients in the inputs": [
        Entry("Saliency", "a first look; the cheapest", "1", True),
        Entry("InputXGradient", "saliency in units of the output", "1", True),
        Entry("IntegratedGradients", "contributions that add up to the output's change", "n_steps", True),
        Entry("GradientShap", "integrated gradients over a distribution of baselines", "n_samples", True),
        Entry("NoiseTunnel", "smooths any other; its variance", "nt_samples", True),
        Entry(
            "DeepLift",
            "contributions that add up, at the cost of one gradient",
            "2",
            True,
            "Captum's, except in the cases below",
            KINKS,
        ),
        Entry("DeepLiftShap", "DeepLIFT over a distribution of baselines", "2 * K", True, "as DeepLift", KINKS),
        Entry("GuidedBackprop", "sharp pictures of what ReLU networks respond to", "1", True, gradient=KINKS),
        Entry("Deconvolution", "the same with ReLU applied backwards", "1", True, gradient=KINKS),
        Entry("GuidedGradCam", "Grad-CAM at the pixels' resolution", "2", True, gradient=KINKS),
        Entry("LRP", "relevance passed back from layer to layer, by a rule for each", "2", True, gradient=KINKS),
    ],
    "Outputs on perturbed inputs": [
        Entry("FeatureAblation", "what is lost without a feature; any model", "D + 5", False),
        Entry("FeaturePermutation", "what is lost when a column is shuffled", "D + 5", False),
        Entry(
            "Occlusion",
            "what is lost behind a window; images",
            "W + 5",
            False,
            "Captum's, averaged in the outputs' precision instead of float32",
        ),
        Entry(
            "ShapleyValueSampling",
            "fair shares of the output, estimated",
            "<= n_samples * (D - 1) + 6",
            False,
            "Captum's, summed in the outputs' precision instead of float32",
        ),
        Entry("ShapleyValues", "fair shares, exactly; few features", "2 ** D + 4", False, "as ShapleyValueSampling"),
        Entry("Lime", "a sparse or smooth linear model around the input", "n_samples + 2", False, "Captum's or closer"),
        Entry("LimeBase", "LIME in terms of your own", "n_samples", False, "Captum's or closer"),
        Entry(
            "KernelShap",
            "Shapley values from few samples",
            "n_samples + 2",
            False,
            "the exact solution; Captum's is float32",
        ),
        Entry("DataLoaderAttribution", "what a metric of a whole data set loses without a feature", "D + 1", False),
    ],
    "Layers": [
        Entry("LayerGradCam", "where a convolutional network looks", "1", True),
        Entry("LayerGradientXActivation", "which units carry the output", "1", True),
        Entry("LayerActivation", "the activations themselves", "1", False),
        Entry("LayerConductance", "which units the change of the output flows through", "n_steps + 1", True),
        Entry("InternalInfluence", "how the output depends on units, on average", "n_steps", True),
        Entry("LayerIntegratedGradients", "integrated gradients of embeddings; text", "n_steps + 2", True),
        Entry("LayerGradientShap", "the same over a distribution of baselines", "3 * n_samples", True),
        Entry("LayerFeatureAblation", "what is lost without a unit or channel", "D + 6", False),
        Entry("LayerFeaturePermutation", "what is lost when a unit or channel is shuffled", "D + 6", False),
        Entry("LayerLRP", "relevance of units", "2", True, gradient=KINKS),
        Entry("LayerDeepLift", "DeepLIFT of units", "2", True, "as DeepLift", KINKS),
        Entry("LayerDeepLiftShap", "the same over a distribution of baselines", "2 * K", True, "as DeepLift", KINKS),
    ],
    "Neurons": [
        Entry("NeuronGradient", "what moves a unit", "1", True),
        Entry("NeuronIntegratedGradients", "what a unit's value consists of", "n_steps", True),
        Entry("NeuronGradientShap", "the same over a distribution of baselines", "n_samples", True),
        Entry("NeuronConductance", "what reaches the output through a unit", "n_steps", True),
        Entry("NeuronDeepLift", "DeepLIFT of a unit", "2", True, "as DeepLift", KINKS),
        Entry("NeuronDeepLiftShap", "the same over a distribution of baselines", "2 * K", True, "as DeepLift", KINKS),
        Entry("NeuronGuidedBackprop", "sharp pictures of what a unit responds to", "1", True, gradient=KINKS),
        Entry("NeuronDeconvolution", "the same with ReLU applied backwards", "1", True, gradient=KINKS),
        Entry("NeuronFeatureAblation", "what a unit loses without a feature", "D + 5", False),
    ],
}

NOT_OFFERED = {
    "LLMAttribution": "explains generated text through a tokenizer; its outputs are no tensors with a graph",
    "LLMGradientAttribution": "as LLMAttribution",
    "RemoteLLMAttribution": "as LLMAttribution, on another machine",
}

DIFFERENCES = [
    (
        "A baseline or feature mask with fewer axes than its input, whose first size happens to be the batch's "
        "(``(3, 1, 1)`` for three images)",
        "KernelShap and Lime read one row per example",
        "a tensor with fewer axes has no batch axis, so the last batch of a loader is read as the others are",
    ),
    (
        "Gaps in the numbers of a feature mask (``[[0, 999]]``)",
        "each missing number is a feature: wrong values in KernelShap and Lime, 2^1000 coalitions in ShapleyValues",
        "numbers are names; only those that occur are features",
    ),
    (
        "Examples with different features",
        "features that an example does not have get coefficients, which change those of the others",
        "each example is explained in terms of its own; absent features get 0",
    ),
    (
        "Fewer masks than input tensors",
        "zeros for the tensors without a mask",
        "an error; so are more masks, booleans and fractions",
    ),
    (
        "NaN or infinity in a feature that is masked",
        "spreads, since it is multiplied by 0",
        "is gone; an attention mask of minus infinity may be ablated with any ``perturbations_per_eval``",
    ),
    (
        "Integers with a fractional baseline in ShapleyValues and ShapleyValueSampling",
        "the baseline is rounded",
        "the copies are floats",
    ),
    (
        "A forward function that writes into its input (``x.mul_(2)``, a first layer ``ReLU(inplace=True)``)",
        "the user's tensor changes, and with it the next evaluation",
        "no class hands out the user's tensors",
    ),
    (
        "KernelShap with one feature",
        "an error",
        "the feature gets the whole difference",
    ),
    (
        "FeaturePermutation of several tensors with ``perturbations_per_eval`` above 1",
        "draws other permutations than with 1",
        "draws the same ones",
    ),
    (
        "Keyword arguments that FeatureAblation and FeaturePermutation do not have (``feature_masks=``)",
        "ignored",
        "a TypeError; ``n_samples`` of FeaturePermutation is the mean over so many permutations",
    ),
    (
        "DeepLIFT of non-linear modules that follow each other (ReLU, MaxPool), of pools whose windows overlap, of a "
        "layer that is itself non-linear with ``attribute_to_layer_input=True``",
        "contributions that do not add up",
        "they add up to the output's difference, to the last digit",
    ),
    (
        "DeepLIFT through a pool with ``dilation``",
        "an error",
        "contributions that add up",
    ),
    (
        "DeepLIFT where a MaxPool's input equals its baseline",
        "the first example's gradient for all",
        "each example's own",
    ),
    (
        "DeepLIFT through ``nn.Softmax``",
        "normalised over the whole batch",
        "each row by itself; it does not add up, and a warning says so",
    ),
    (
        "DeepLIFT through modules without a rule (GELU, SiLU, LayerNorm)",
        "plain gradients, silently",
        "plain gradients, and a warning that names the modules if contributions miss the output's difference",
    ),
    (
        "DeepLIFT in float16 where an input equals its baseline",
        "NaN",
        "the gradient",
    ),
    (
        "A layer that is called twice in a forward pass",
        "the last call's values, or zero",
        "an error",
    ),
    (
        "LayerIntegratedGradients before an operation in place",
        "an error",
        "as before any other operation",
    ),
    (
        "A layer whose output is a tuple with None in it (``nn.MultiheadAttention``)",
        "an error",
        "its tensors are explained",
    ),
    (
        "LayerFeaturePermutation with a target",
        "an error: it is chosen twice",
        "chosen once",
    ),
    (
        "DataLoaderAttribution of a loader whose batches are tensors",
        "the first row for the batch",
        "the batch",
    ),
    (
        "The rules that a user sets for LRP (``module.rule``)",
        "deleted by the call",
        "stay",
    ),
    (
        "Noise of NoiseTunnel and GradientShap on inputs in half precision",
        "float32, which a model in half precision refuses",
        "of the inputs' precision",
    ),
]
"""(the case, what Captum 0.9 does, what this package does)"""

HEAD = """All attributions
================

After this page you know what each attribution is for, what it costs, and where its numbers differ from Captum's.

The classes are subclasses of those of Captum 0.9, with the same arguments and the same numbers. With
``create_graph=True`` they have the gradient with respect to the weights, which finite differences confirm
(`captum_idexpo.testing.assert_trainable`).

*Cost* is the number of rows that go through the model per example, for D features, W windows or K baselines. ∇ means
that a gradient is taken through each row as well. Ablation and Shapley values use four more rows to test whether
copies can share a forward pass, unless ``perturbations_per_eval`` is given. With ``create_graph=True`` the backward
pass of the loss goes through all rows once more.
"""

NUMBERS = """
Where the numbers differ
------------------------

For the same seed the numbers are Captum's. Where Captum's number breaks the method's own definition, the right one is
returned:

"""

TAIL = """
Not offered
-----------

A class that cannot be done right is left out. Captum's own goes on to work beside this package, without a graph.

"""


def page() -> str:
    """The page as reStructuredText."""
    parts = [HEAD]
    for title, entries in OFFERED.items():
        parts += [
            f"\n{title}\n{'-' * len(title)}\n\n.. list-table::\n   :header-rows: 1\n   :widths: 26 34 18 22 20\n\n"
        ]
        parts += [_row("class", "what it is for", "cost", "numbers", "gradient")]
        parts += [
            _row(
                f":class:`~captum_idexpo.attr.{entry.name}`",
                entry.purpose,
                f"``{entry.cost}``" + (" ∇" if entry.takes_gradients else ""),
                entry.numbers,
                entry.gradient,
            )
            for entry in entries
        ]
    parts += [
        NUMBERS,
        ".. list-table::\n   :header-rows: 1\n   :widths: 36 32 32\n\n",
        _row("case", "Captum 0.9", "here"),
    ]
    parts += [_row(*difference) for difference in DIFFERENCES]
    parts += [TAIL, ".. list-table::\n   :header-rows: 1\n   :widths: 30 70\n\n", _row("class", "why")]
    parts += [_row(f"``{name}``", reason) for name, reason in NOT_OFFERED.items()]
    return "".join(parts)


def _row(*cells: str) -> str:
    return "   * - " + "\n     - ".join(cells) + "\n"


def write(path: Path) -> None:
    """Writes the page, if it is not what stands there already."""
    if not path.exists() or path.read_text() != page():
        path.write_text(page())
