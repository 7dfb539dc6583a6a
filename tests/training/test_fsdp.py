"""Models sharded by FSDP2 over two gloo processes: gradients, weights and checkpoints are those of one process."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import LayerGradCam, Lime, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.regularizers import InsertionDeletion, RightForTheRightReasons
from captum_idexpo.training import checkpoint, gathered
from tests.helpers import smooth_conv_net
from tests.launch import run_together

FSDPModule = getattr(pytest.importorskip("torch.distributed.fsdp"), "FSDPModule", None)
if not hasattr(FSDPModule, "set_reshard_after_forward"):
    pytest.skip("FSDP2 came later", allow_module_level=True)

X = torch.randn(22, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (22,), generator=torch.Generator().manual_seed(0))
ANNOTATIONS = (X > 0).double()
GRADIENTS = [
    ("Grad-CAM", "root"),
    ("Grad-CAM", "layers"),
    ("LIME", "root"),
    ("LIME", "layers"),
    ("RRR", "layers"),
    ("bounded", "layers"),
]
TRAININGS = [("Grad-CAM", "root"), ("LIME", "layers"), ("RRR", "layers")]
KILLED_AT = [4, 6]  # an epoch's end is saved after its two updates: within the second epoch, and after it


def net_of(sharding):
    """A net whose parameters are sharded, all at once or layer by layer; None: not at all."""
    net = smooth_conv_net()
    net[3].p = 0.0
    if sharding is not None:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in (net[0], net[4], net[8]) if sharding == "layers" else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def regularizer_of(name, net):
    generator = torch.Generator().manual_seed(5)
    weights = {"insertion_weight": 0.5, "deletion_weight": 0.5, "baselines": 0.0, "generator": generator}
    if name == "RRR":
        return RightForTheRightReasons(net, weight=10.0)
    if name == "LIME":
        return InsertionDeletion(
            Lime(net, Ridge(0.1), MaskSimilarity()),
            feature_mask=torch.arange(36).view(1, 1, 6, 6) // 9,
            attribute_kwargs={"sampling": "independent", "n_samples": 9},
            steps_per_update=2,
            **weights,
        )
    budget = 20_000 if name == "bounded" else None
    return InsertionDeletion(LayerGradCam(net, net[4]), step_size=6, memory_budget=budget, **weights)


def whole(tensors):
    """The values of sharded or other tensors, as a list."""
    tensors = [tensor.detach() for tensor in tensors]
    return torch.cat([(t.full_tensor() if hasattr(t, "full_tensor") else t).flatten() for t in tensors]).tolist()


def share(tensor, rank, n_processes):
    return tensor.chunk(n_processes)[rank]


def gradients(name, sharding, rank=0, n_processes=1):
    """Of the second of two steps: what the first one leaves behind would be seen."""
    net = net_of(sharding)
    loss = ExplanationRegularizedLoss(net, [regularizer_of(name, net)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with gathered(net):
            loss(tuple(share(tensor[:8], rank, n_processes) for tensor in (X, Y, ANNOTATIONS)))[0].backward()
        found = whole(parameter.grad for parameter in net.parameters())
        optimizer.step()
    return found


def trainer_of(name, sharding, folder=None, **settings):
    accelerator = settings.pop("accelerator", None) or Accelerator(cpu=True)
    net = net_of(None if sharding == "accelerate" else sharding)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05, weight_decay=0.01)
    return ExplanationRegularizedTrainer(
        net,
        optimizer,
        [regularizer_of(name, net)],
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
        accelerator=accelerator,
        evaluation=regularizer_of("Grad-CAM", net),
        max_grad_norm=0.5,
        checkpoint_dir=folder,
        show_progress=False,
        **settings,
    )


def loaders(n_processes=1):
    train = DataLoader(TensorDataset(X[:16], Y[:16], ANNOTATIONS[:16]), batch_size=8 // n_processes)
    return train, DataLoader(TensorDataset(X[16:], Y[16:]), batch_size=4 // n_processes)


def outcome(trainer, history, n_processes=1):
    names = [name for name in history[0] if not name.startswith("seconds") and not name.endswith("_norm")]
    return {
        "history": [{name: row[name] for name in names} for row in history],
        "weights": whole(trainer.model.parameters()),
        "scores": trainer.example_scores(loaders(n_processes)[1])["insertion"].tolist(),
    }


def training(name, sharding, n_processes=1, **settings):
    """What a short run leaves; it is evaluated before its first step, too."""
    trainer = trainer_of(name, sharding, **settings)
    before = trainer.evaluate(loaders(n_processes)[1])
    history = trainer.fit(*loaders(n_processes), epochs=3)
    return {"before": before, **outcome(trainer, history, n_processes)}


class KilledError(Exception):
    pass


def resumed_training(name, sharding, killed_at, folder, n_processes):
    """A run that ends in all processes after so many checkpoints, one an update, and is resumed by another trainer."""
    trainer = trainer_of(name, sharding, folder, checkpoint_every=1)
    save, saved = trainer._save, []

    def save_and_die(run):
        save(run)
        saved.append(run)
        if len(saved) == killed_at:
            raise KilledError

    trainer._save = save_and_die
    with pytest.raises(KilledError):
        trainer.fit(*loaders(n_processes), epochs=3)
    torch.manual_seed(99)
    resumed = trainer_of(name, sharding, folder, checkpoint_every=1)
    resumed.resume()
    return outcome(resumed, resumed.fit(*loaders(n_processes), epochs=3), n_processes)


def fsdp2_of_accelerate():
    """One that shards layers of 50 parameters and more, which accelerate itself would do on GPUs only."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=50)
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def stopped(n_processes):
    """The weights that are left after three batches of which the second is NaN in the first process."""
    x = X[:12].clone()
    x[4] = float("nan")
    trainer = trainer_of("Grad-CAM", "layers" if n_processes > 1 else None)
    with pytest.raises(NonFiniteError, match="last good weights"):
        trainer.fit(DataLoader(TensorDataset(x, Y[:12]), batch_size=4 // n_processes))
    return whole(trainer.model.parameters())


def in_half_precision():
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "bf16"  # which a process is to choose once
    return accelerator


def refusals():
    """What a trainer says of models and settings that it cannot train."""
    from torch.distributed.fsdp import fully_shard

    parts = smooth_conv_net()
    fully_shard(parts[0], mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    late = net_of(None)
    optimizer = torch.optim.SGD(late.parameters(), lr=0.1)
    fully_shard(late, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    attempts = {
        "parts": lambda: ExplanationRegularizedTrainer(parts, torch.optim.SGD(parts.parameters(), lr=0.1)),
        "late": lambda: ExplanationRegularizedTrainer(late, optimizer),
        "statistics": lambda: trainer_of("RRR", "root", freeze_batch_norm=False),
        "precision": lambda: trainer_of("RRR", "root", accelerator=in_half_precision()),
    }
    said = {}
    for name, attempt in attempts.items():
        with pytest.raises(ValueError, match=r"fully_shard|owns none|statistics|precision") as error:
            attempt()
        said[name] = str(error.value)
    return said


def main(folder):
    """What each of two processes does, and returns."""
    warnings.simplefilter("error")
    Accelerator(cpu=True)
    rank, n_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    checkpoints = folder / "checkpoints"
    result = {
        "gradients": {f"{n} {s}": gradients(n, s, rank, n_processes) for n, s in GRADIENTS},
        "training": {
            f"{n} {s}": training(n, s, n_processes, gradient_norms_every=2 if n == "LIME" else None)
            for n, s in TRAININGS
        },
        "resumed": {
            str(at): resumed_training("LIME", "layers", at, checkpoints / str(at), n_processes) for at in KILLED_AT
        },
        "stopped": stopped(n_processes),
    }
    half = Accelerator(cpu=True, gradient_accumulation_steps=2)
    result["accumulated"] = training("Grad-CAM", "layers", 2 * n_processes, accelerator=half)["weights"]
    result["accelerate"] = training("Grad-CAM", "accelerate", n_processes, accelerator=fsdp2_of_accelerate())
    result["refusals"] = refusals()
    torch.distributed.destroy_process_group()
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    return run_together(2, main, folder), folder


@pytest.fixture(scope="module")
def alone():
    """What one process, which shards nothing, arrives at; each run once."""
    return functools.cache(lambda name: training(name, None))


@pytest.mark.parametrize(("name", "sharding"), GRADIENTS)
def test_fsdp_gradients_equal_those_of_one_process(results, name, sharding):
    expected = gradients(name, None)
    for process in results[0]:
        assert process["gradients"][f"{name} {sharding}"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def assert_same(ours, theirs):
    for name in ("weights", "scores", "before"):
        assert ours.get(name, theirs[name]) == pytest.approx(theirs[name], rel=1e-6, abs=1e-9)
    for row, expected in zip(ours["history"], theirs["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("name", "sharding"), TRAININGS)
def test_fsdp_training_equals_that_of_one_process(results, alone, name, sharding):
    """Steps, clipped gradients, scores and the best weights, which are put back."""
    for process in results[0]:
        assert_same(process["training"][f"{name} {sharding}"], alone(name))


def test_best_weights_are_not_always_the_last(alone):
    """So that the test above sees them put back."""
    scores = [[row["valscore"] for row in alone(name)["history"]] for name, _ in TRAININGS]
    assert any(max(valscores) > valscores[-1] for valscores in scores)


def test_fsdp_training_equals_one_process_when_accelerate_shards(results, alone):
    for process in results[0]:
        assert_same(process["accelerate"], alone("Grad-CAM"))


def test_fsdp_gradient_accumulation_equals_the_whole_batch(results, alone):
    for process in results[0]:
        assert process["accumulated"] == pytest.approx(alone("Grad-CAM")["weights"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("killed_at", KILLED_AT)
def test_fsdp_resume_ends_as_an_uninterrupted_run(results, killed_at):
    for process in results[0]:
        expected = {name: value for name, value in process["training"]["LIME layers"].items() if name != "before"}
        assert process["resumed"][str(killed_at)] == expected


def test_fsdp_checkpoint_holds_whole_weights_under_the_users_names(results):
    [folder, *_] = sorted((results[1] / "checkpoints").iterdir())
    state, _ = checkpoint.load_latest(folder)
    net = net_of(None)
    for weights in (state["model"], state["run"]["best_weights"]):
        assert {name: value.shape for name, value in weights.items()} == {
            n: v.shape for n, v in net.state_dict().items()
        }
    net.load_state_dict(state["model"])
    moments = state["optimizer"]["state"]["0.weight"]
    assert moments["exp_avg"].shape == net[0].weight.shape


def test_fsdp_training_stops_in_all_processes_at_a_nonfinite_batch(results):
    for process in results[0]:
        assert process["stopped"] == pytest.approx(stopped(1), rel=1e-6, abs=1e-9)


def test_fsdp_refuses_untrainable_settings_before_training_starts(results):
    for process in results[0]:
        said = process["refusals"]
        assert "owns none" in said["late"]
        assert "call fully_shard(model) on the model itself" in said["parts"]
        assert "'1.weight'" in said["parts"]
        assert "statistics of its own in ['1']" in said["statistics"]
        assert "mixed_precision='bf16'" in said["precision"]
        assert "mp_policy=" in said["precision"]


def test_fsdp1_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(type(accelerator), "is_fsdp2", False)
    with pytest.raises(ValueError, match=r"FSDP2, not FSDP1.*fsdp_version=2"):
        trainer_of("RRR", None, accelerator=accelerator)


def test_gathered_leaves_an_unsharded_model_unchanged():
    net = smooth_conv_net()
    with gathered(net):
        assert net(X).shape == (22, 3)
