"""What training of this kind needs: terms that explode, weights that warm up, gradients that dwarf the task's."""

from __future__ import annotations

import csv

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import InputXGradient, LayerGradCam, Lime, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.baselines import mean_inputs
from captum_idexpo.regularizers import (
    Fidelity,
    GaussianNeighbors,
    InsertionDeletion,
    RightForTheRightReasons,
    Sparsity,
    Stability,
)
from captum_idexpo.training import linear_warmup
from tests.helpers import smooth_conv_net, smooth_net

X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def trainer_of(net, regularizers=(), lr=0.05, **settings):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return ExplanationRegularizedTrainer(net, optimizer, regularizers, show_progress=False, **settings)


def loader(x=X, size=4):
    return DataLoader(TensorDataset(x, Y[: len(x)]), batch_size=size)


def test_weight_schedule_raises_the_regularizers_weights():
    net = smooth_net()
    seen = []

    def schedule(update):
        seen.append(update)
        return linear_warmup(4)(update)

    trainer = trainer_of(net, [Sparsity(InputXGradient(net), weight=2.0)], weight_schedule=schedule)
    history = trainer.fit(loader(), epochs=3)
    assert seen == list(range(9))
    assert history[0]["sparsity"] < history[1]["sparsity"] < history[2]["sparsity"] * 1.2
    net = smooth_net()
    loss = ExplanationRegularizedLoss(net, [Sparsity(InputXGradient(net))])
    _, whole = loss((X, Y))
    loss.regularizer_factor = 0.25
    _, quarter = loss((X, Y))
    torch.testing.assert_close(quarter["sparsity"], 0.25 * whole["sparsity"])
    torch.testing.assert_close(quarter["task"], whole["task"])


def test_gradient_norms_are_measured_and_a_dominating_term_is_named():
    net = smooth_net()
    regularizer = Sparsity(InputXGradient(net), weight=1e4)
    trainer = trainer_of(net, [regularizer], lr=1e-9, gradient_norms_every=2)
    with pytest.warns(UserWarning, match=r"gradient of 'sparsity' is \d+ times the task's.*weight_schedule"):
        history = trainer.fit(loader(), epochs=1)
    twin = smooth_net()
    norms = []
    for start in (0, 8):  # updates 0 and 2
        loss = nn.functional.cross_entropy(twin(X[start : start + 4]), Y[start : start + 4])
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
    assert history[0]["task_gradient_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)


def test_gradient_norms_every_changes_no_result():
    results = []
    for every in (None, 1):
        net = smooth_conv_net().train()
        torch.manual_seed(0)
        regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, steps_per_update=2)
        trainer_of(net, [regularizer], gradient_norms_every=every).fit(loader(IMAGES), epochs=1)
        results.append(torch.cat([parameter.flatten() for parameter in net.parameters()]))
    assert torch.equal(*results)


def test_max_grad_norm_clips_the_gradients():
    net, twin = smooth_net(), smooth_net()
    trainer_of(net, lr=1.0, max_grad_norm=1e-3).fit([(X, Y)])
    moved = torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), twin.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_deletion_floor_share_is_reported():
    net = smooth_conv_net()
    settings = {"baselines": 0.0, "step_size": 6, "deletion_form": "ratio", "deletion_floor": 0.4}
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), **settings)
    with pytest.warns(UserWarning, match="deletion floor"):
        history = trainer_of(net, [regularizer]).fit(loader(IMAGES))
    assert 0 < history[0]["deletion_floor_share"] <= 1


def test_history_splits_the_time_of_a_step():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, step_size=6)
    row = trainer_of(net, [regularizer]).fit(loader(IMAGES))[0]
    parts = sum(row[f"seconds_{name}"] for name in ("task", "explainer", "metric", "backward"))
    assert 0 < parts <= row["seconds_per_step"]


def test_callbacks_trackers_and_csv_receive_each_epoch(tmp_path):
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    net, rows = smooth_net(), []
    trainer = trainer_of(
        net, accelerator=accelerator, callbacks=[lambda trainer, row: rows.append((trainer.history[-1], row))]
    )
    history = trainer.fit(loader(), epochs=2)
    accelerator.end_training()
    assert [row["epoch"] for row, _ in rows] == [1, 2]
    assert all(a is b for a, b in rows)
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in history]


def test_mean_baselines_are_measured_once():
    net = smooth_conv_net()
    mean = "".join(["me", "an"])  # read from a file, say: an equal string, not the same
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=mean, step_size=6)
    with pytest.raises(ValueError, match=r"measured when the trainer.*mean_inputs\(train_loader\)"):
        regularizer(IMAGES, Y[:8])
    trainer_of(net, [regularizer]).fit(loader(IMAGES))
    expected = IMAGES.mean(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(regularizer.baselines, expected)
    pair = mean_inputs([((X, IMAGES[:12]), Y)])
    torch.testing.assert_close(pair[0], X.mean(0, keepdim=True))
    with pytest.raises(ValueError, match="baselines must be numbers"):
        InsertionDeletion(LayerGradCam(net, net[4]), baselines="median")
    with pytest.raises(ValueError, match="no batch"):
        mean_inputs([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "patience"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"gradient_norms_every": 0}, "gradient_norms_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
    ],
)
def test_trainer_refuses_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(smooth_net(), **settings)


def test_example_scores_average_to_the_evaluation():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, step_size=6)
    trainer = trainer_of(net, [regularizer])
    scores, means = trainer.example_scores(loader(IMAGES, 3)), trainer.evaluate(loader(IMAGES, 3))
    assert set(scores) == {"accuracy", "insertion", "deletion", "one_minus_deletion"}
    for name, values in scores.items():
        assert values.shape == (8,)
        assert values.double().mean().item() == pytest.approx(means[name])
    expected = regularizer.scores(IMAGES).insertion
    torch.testing.assert_close(scores["insertion"], expected)
    assert set(trainer_of(smooth_net()).example_scores(loader())) == {"accuracy"}


def test_gradient_norms_every_changes_no_generator_or_batch_norm_statistic():
    results = []
    for every in (None, 1):
        net = smooth_conv_net().train()
        torch.manual_seed(0)
        regularizer = Stability(net, generator=torch.Generator().manual_seed(1))
        settings = {"gradient_norms_every": every, "freeze_batch_norm": False}
        trainer_of(net, [regularizer], **settings).fit(loader(IMAGES), epochs=1)
        results.append(torch.cat([value.flatten() for value in net.state_dict().values()]))
    assert torch.equal(*results)


def regularizer_of(name, net):
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "baselines": 0.0,
        "insertion_weight": 1.0,
        "deletion_weight": 1.0,
        "deletion_form": "ratio",
        "deletion_floor": None,
    }
    if name == "Grad-CAM":
        return InsertionDeletion(LayerGradCam(net, net[4]), step_size=6, **arguments)
    if name == "LIME":
        return InsertionDeletion(
            Lime(net, Ridge(0.1), MaskSimilarity()),
            feature_mask=torch.arange(36).view(1, 1, 6, 6) // 9,
            attribute_kwargs={"sampling": "independent", "n_samples": 20},
            generator=generator,
            **arguments,
        )
    if name == "RRR":
        return RightForTheRightReasons(net)
    if name == "Fidelity":
        return Fidelity(net, GaussianNeighbors(one_dimensional=True), generator=generator)
    return Stability(net, generator=generator)


@pytest.fixture
def accelerator_of():
    """Accelerators of several precisions, one after the other, in a process that is allowed but one."""

    def make(precision, scale=2.0**10):
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        if precision == "fp16":  # accelerate scales losses on GPUs only
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    yield make
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["Grad-CAM", "LIME", "RRR", "Fidelity", "Stability"])
def test_half_precision_gradient_is_near_that_of_single_precision(name, precision, accelerator_of):
    """Second-order term included; the surrogate's solve and differences of neighbours keep their precision."""
    gradients = []
    for used in ("no", precision):
        accelerator = accelerator_of(used)
        net = smooth_conv_net().float()
        loss = ExplanationRegularizedLoss(net, [regularizer_of(name, net)], lambda output, _: 0 * output.sum())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        prepared, _ = accelerator.prepare(loss, optimizer)
        total, _ = prepared((IMAGES.float(), Y[:8], (IMAGES > 0).float()))
        accelerator.backward(total)
        if accelerator.scaler is not None:
            accelerator.scaler.unscale_(optimizer)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0).item() > 0.998
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.02)


def half_trainer(accelerator, folder=None, **settings):
    """Batches of four, one update each; the images' gradients in half precision."""
    net = smooth_conv_net().float()
    settings = {"lr": 0.1, "checkpoint_dir": folder, **settings}
    trainer = trainer_of(net, [regularizer_of("Grad-CAM", net)], accelerator=accelerator, **settings)
    return trainer, loader(IMAGES.float())


def flat(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_training_ends_near_that_in_single_precision(precision, accelerator_of):
    start, ends = flat(smooth_conv_net().float()), []
    for used in ("no", precision):
        trainer, batches = half_trainer(accelerator_of(used))
        scores = trainer.fit(batches, batches, epochs=2)[-1]
        ends.append(flat(trainer.model) - start)
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert torch.cosine_similarity(*ends, dim=0).item() > 0.995
    assert 0 <= scores["val_insertion"] <= 1


def test_grad_scaler_skips_an_update_that_overflows_but_not_the_next(accelerator_of):
    """The scale is the scaler's business: no failure of the loss, nor of the gradient."""
    accelerator = accelerator_of("fp16", scale=2.0**24)
    average = AveragedModel(smooth_conv_net().float())
    trainer, batches = half_trainer(accelerator, averaged_model=average)
    start = flat(trainer.model)
    trainer.fit([next(iter(batches))])
    assert int(average.n_averaged) == 0
    assert torch.equal(flat(trainer.model), start)
    assert accelerator.scaler.get_scale() == 2.0**23
    trainer.fit(batches, epochs=6)
    assert accelerator.scaler.get_scale() < 2.0**20
    assert (flat(trainer.model) - start).norm() > 0.01


def test_max_grad_norm_clips_unscaled_gradients_in_half_precision(accelerator_of):
    trainer, batches = half_trainer(accelerator_of("fp16"), lr=1.0, max_grad_norm=1e-3)
    start = flat(trainer.model)
    trainer.fit([next(iter(batches))])
    assert (flat(trainer.model) - start).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_half_precision_training_stops_at_a_nonfinite_loss(accelerator_of):
    trainer, _ = half_trainer(accelerator_of("fp16"))
    with pytest.raises(NonFiniteError, match=r"'task' is not finite.*epoch 1, step 1"):
        trainer.fit([(IMAGES.float() * float("nan"), Y[:8])])


def test_grad_scaler_scale_is_resumed(accelerator_of, tmp_path):
    trainer, batches = half_trainer(accelerator_of("fp16", scale=2.0**24), tmp_path)
    trainer.fit(batches, epochs=1)
    again, batches = half_trainer(accelerator_of("fp16"), tmp_path)
    again.resume()
    assert again.accelerator.scaler.get_scale() == 2.0**22
    assert torch.equal(flat(again.model), flat(trainer.model))


class Tail(nn.Module):
    """Two layers, of which an optimizer may own the last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.first(x.float()).tanh())


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_parameters_outside_the_optimizer_are_not_clipped_and_lose_grad(accelerator_of, precision):
    batches = list(loader()) * 3
    model, twin = Tail(), Tail()
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.SGD(model.last.parameters(), lr=0.1),
        accelerator=accelerator_of(precision),
        max_grad_norm=0.3,
        show_progress=False,
    )
    trainer.fit(batches)
    optimizer = torch.optim.SGD(twin.last.parameters(), lr=0.1)
    for x, y in batches:
        nn.functional.cross_entropy(twin(x), y).backward()
        nn.utils.clip_grad_norm_(twin.last.parameters(), 0.3)
        optimizer.step()
        twin.zero_grad()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_grad_scaler_unscales_gradients_once_for_a_second_trainer(accelerator_of):
    def trained(accelerator, model, lr):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        settings = {"accelerator": accelerator, "max_grad_norm": 0.3, "show_progress": False}
        ExplanationRegularizedTrainer(model, optimizer, **settings).fit(loader())
        return model

    models = []
    for shared in (False, True):
        accelerator = accelerator_of("fp16")
        model = trained(accelerator, Tail(), 0.01)
        models.append(trained(accelerator if shared else accelerator_of("fp16"), model, 0.5))
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-3, atol=1e-3)


def test_gradient_norms_are_measured_before_an_automatic_weight_is_set():
    results = []
    for every in (None, 1):
        net = smooth_net()
        torch.manual_seed(0)
        regularizer = Fidelity(net, GaussianNeighbors(0.5, one_dimensional=True), weight="auto", ratio=0.1)
        trainer_of(net, [regularizer], gradient_norms_every=every).fit(loader())
        results.append(flat(net))
    assert torch.equal(*results)


def test_gradient_norms_are_measured_in_the_precision_of_training(accelerator_of):
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(6, 3), []

        def forward(self, x):
            output = self.linear(x)
            self.seen.append(output.dtype)
            return output

    model = Seen()
    trainer_of(model, accelerator=accelerator_of("bf16"), gradient_norms_every=1).fit([(X.float(), Y)])
    assert set(model.seen) == {torch.bfloat16}


def test_interrupted_update_leaves_no_gradient_to_the_next_run():
    def run(break_off):
        net, calls = smooth_net(), []

        def loss_fn(output, target):
            calls.append(1)
            if break_off and len(calls) == 2:
                raise KeyboardInterrupt
            return nn.functional.cross_entropy(output, target)

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        trainer = ExplanationRegularizedTrainer(
            net, optimizer, [], loss_fn, accelerator=accelerator, show_progress=False
        )
        if break_off:
            with pytest.raises(KeyboardInterrupt):
                trainer.fit(loader())
        trainer.fit(loader())
        return flat(net)

    assert torch.equal(run(True), run(False))


def test_gradient_accumulation_steps_are_unchanged_by_another_trainer():
    def run(another):
        net = smooth_net()
        trainer = trainer_of(net, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=3))
        if another:
            trainer_of(smooth_net())
        trainer.fit(loader())
        return flat(net)

    assert torch.equal(run(True), run(False))


def test_final_check_of_an_epoch_uses_the_mode_and_precision_of_training(accelerator_of):
    class Auxiliary(nn.Module):
        """Another output in training, as Inception's."""

        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return (self.one(x), self.other(x)) if self.training else self.one(x)

    model = Auxiliary()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        [],
        lambda outputs, target: sum(nn.functional.cross_entropy(output, target) for output in outputs),
        accelerator=accelerator_of("bf16"),
        show_progress=False,
    )
    history = trainer.fit([(X.bfloat16(), Y)], epochs=2)
    assert history[1]["loss"] < history[0]["loss"]


def test_automatic_weights_are_reported_for_each_regularizer():
    net = smooth_net()
    regularizers = [Stability(net, weight="auto", ratio=ratio, generator=torch.Generator()) for ratio in (0.5, 0.25)]
    row = trainer_of(net, regularizers).fit(loader())[0]
    assert row["stability_weight"] == regularizers[0].weight
    assert row["stability_weight_2"] == regularizers[1].weight != regularizers[0].weight


class Exploding(nn.Module):
    """A loss that learns, whose own gradient is infinite at zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, output, target):
        return nn.functional.cross_entropy(output, target) + self.scale.abs().sqrt()


def test_gradient_of_learned_loss_parameters_is_checked():
    net, loss_fn = smooth_net(), Exploding()
    optimizer = torch.optim.SGD([*net.parameters(), *loss_fn.parameters()], lr=0.1)
    trainer = ExplanationRegularizedTrainer(net, optimizer, [], loss_fn, show_progress=False)
    with pytest.raises(NonFiniteError, match=r"gradient of the loss in 'loss_fn\.scale'"):
        trainer.fit([(X, Y)])
    assert loss_fn.scale == 0


def test_loader_that_calls_model_eval_leaves_training_in_train_mode():
    net, seen = smooth_conv_net().train(), []
    net.register_forward_pre_hook(lambda module, _: seen.append(module.training))

    class Labelling:
        def __iter__(self):
            for x in IMAGES.split(4):
                net.eval()
                yield x, net(x).argmax(1)

    trainer_of(net).fit(Labelling())
    assert seen[:4] == [False, True] * 2


def test_train_method_with_another_signature_is_not_called():
    class Fitted(nn.Linear):
        def train(self, loader, epochs):
            raise AssertionError

    model = Fitted(6, 3).double()
    trainer_of(model).fit([(X, Y)])
