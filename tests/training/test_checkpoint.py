"""Runs that are killed at any moment, files that are cut short or changed, disks that are full."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam, Lime, MaskSimilarity, Saliency
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.regularizers import InsertionDeletion, Smoothness, Sparsity
from captum_idexpo.training import CheckpointError, checkpoint
from tests.helpers import smooth_conv_net
from tests.launch import CONTEXT

X = torch.randn(20, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))


def trainer_of(folder, **settings):
    """Everything that draws: shuffling, dropout, LIME's masks, steps, each from another stream."""
    net = smooth_conv_net().train()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    explainer = Lime(net, Ridge(0.1), MaskSimilarity())
    regularizers = [
        InsertionDeletion(
            explainer,
            baselines=0.0,
            feature_mask=torch.arange(36).view(1, 1, 6, 6) // 9,
            steps_per_update=2,
            attribute_kwargs={"sampling": "independent", "n_samples": 8},
            generator=generator,
        ),
        Sparsity(explainer, weight="auto", ratio=0.1, attribute_kwargs={"n_samples": 5}),
    ]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    trainer = ExplanationRegularizedTrainer(
        net,
        optimizer,
        regularizers,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        checkpoint_dir=folder,
        show_progress=False,
        freeze_batch_norm=False,
        **settings,
    )
    loaders = [
        DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(2)),
        DataLoader(TensorDataset(X[:8], Y[:8]), batch_size=4),
    ]
    return trainer, loaders


def without_times(history):
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in history]


class KilledError(Exception):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Trains until so many checkpoints are written."""

    def fit(trainer, *args, after, **settings):
        original, calls = checkpoint.save, []

        def save_and_die(*args):
            original(*args)
            calls.append(1)
            if len(calls) == after:
                raise KilledError

        monkeypatch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KilledError):
            trainer.fit(*args, **settings)
        monkeypatch.undo()

    return fit


@pytest.mark.parametrize("killed_at", [1, 3, 4, 5, 8, 12])
def test_resume_ends_bit_for_bit_as_an_uninterrupted_run(tmp_path, killed_at, killed):
    whole, loaders = trainer_of(None)
    expected = whole.fit(*loaders, epochs=3)

    trainer, loaders = trainer_of(tmp_path, checkpoint_every=1)
    killed(trainer, *loaders, epochs=3, after=killed_at)

    resumed, loaders = trainer_of(tmp_path, checkpoint_every=1)
    torch.manual_seed(99)  # whatever the new process draws before it resumes
    np.random.rand(3)
    random.random()
    resumed.resume()
    history = resumed.fit(*loaders, epochs=3)
    assert without_times(history) == without_times(expected)
    for (name, ours), theirs in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("killed_at", [2, 4, 6])
def test_resume_continues_schedules_of_updates_and_averaged_weights(tmp_path, killed_at, killed):
    def averaging(folder):
        average = AveragedModel(smooth_conv_net(), multi_avg_fn=get_ema_multi_avg_fn(0.7))
        return trainer_of(folder, scheduler_interval="update", checkpoint_every=1, averaged_model=average)

    whole, loaders = averaging(None)
    expected = whole.fit(*loaders, epochs=2)
    trainer, loaders = averaging(tmp_path)
    killed(trainer, *loaders, epochs=2, after=killed_at)
    resumed, loaders = averaging(tmp_path)
    resumed.resume()
    assert without_times(resumed.fit(*loaders, epochs=2)) == without_times(expected)
    for ours, theirs in ((resumed.model, whole.model), (resumed.averaged_model, whole.averaged_model)):
        for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
    plain, _ = trainer_of(tmp_path, scheduler_interval="update")
    with pytest.raises(CheckpointError, match="its averaged_model is AveragedModel, this one's None"):
        plain.resume()
    by_epoch, _ = trainer_of(tmp_path)
    with pytest.raises(CheckpointError, match="its scheduler is StepLR by the update, this one's StepLR"):
        by_epoch.resume()
    other, _ = averaging(tmp_path)
    other.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(CheckpointError, match="belongs to another"):
        other.resume()
    assert int(other.averaged_model.n_averaged) == 0


class Noisy(Dataset):
    """Draws from a generator of its own, in a transform."""

    def __init__(self) -> None:
        self.transform = Noise()

    def __getitem__(self, index):
        return self.transform(X[index]), Y[index]

    def __len__(self) -> int:
        return len(X)


class Noise:
    def __init__(self) -> None:
        self.source = torch.Generator().manual_seed(4)

    def __call__(self, x):
        return x + 0.1 * torch.randn(x.shape, generator=self.source, dtype=x.dtype)


def test_resume_restores_generators_of_data_sets_and_mean_baselines(tmp_path, killed):
    """The mean of what a shuffled loader yields, without its last batch, is another each time."""

    def trainer_and_loader(folder):
        net = smooth_conv_net()
        torch.manual_seed(0)
        regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines="mean", insertion_weight=1.0)
        judge = InsertionDeletion(LayerGradCam(net, net[4]), baselines="mean")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        data = Noisy()
        settings = {"checkpoint_dir": folder, "checkpoint_every": 1, "evaluation": judge, "show_progress": False}
        settings["generators"] = [data.transform.source]
        trainer = ExplanationRegularizedTrainer(net, optimizer, [regularizer], **settings)
        return trainer, DataLoader(Subset(data, range(18)), batch_size=4, shuffle=True, drop_last=True)

    whole, loader = trainer_and_loader(None)
    expected = whole.fit(loader, [(X, Y)], epochs=2)

    trainer, loader = trainer_and_loader(tmp_path)
    killed(trainer, loader, [(X, Y)], epochs=2, after=7)  # in the second epoch
    resumed, loader = trainer_and_loader(tmp_path)
    torch.manual_seed(99)
    resumed.resume()
    assert without_times(resumed.fit(loader, [(X, Y)], epochs=2)) == without_times(expected)


class Shuffling:
    """A loader of one's own, of unknown length or not, that draws from a generator of its own or torch's."""

    def __init__(self, own):
        self.generator = torch.Generator().manual_seed(3) if own else None

    def __iter__(self):
        for _ in range(5):
            at = torch.randint(20, (4,), generator=self.generator)
            yield X[at], Y[at]


class Sized(Shuffling):
    def __len__(self):
        return 5


@pytest.mark.parametrize("n_passes", [1, 2, 3])
@pytest.mark.parametrize(("kind", "own"), [(Shuffling, True), (Sized, True), (Sized, False)])
@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_resume_continues_custom_loaders_where_they_stopped(tmp_path, killed, kind, own, n_passes, killed_at):
    def trainer_and_loader(folder):
        net = smooth_conv_net().train()
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=n_passes)
        settings = {"checkpoint_dir": folder, "checkpoint_every": 1, "accelerator": accelerator}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return ExplanationRegularizedTrainer(net, optimizer, show_progress=False, **settings), kind(own)

    whole, loader = trainer_and_loader(None)
    expected = whole.fit(loader, epochs=2)
    trainer, loader = trainer_and_loader(tmp_path)
    killed(trainer, loader, epochs=2, after=killed_at)
    resumed, loader = trainer_and_loader(tmp_path)
    torch.manual_seed(99)
    resumed.resume()
    assert without_times(resumed.fit(loader, epochs=2)) == without_times(expected)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resume_restores_mean_baselines_in_a_new_trainer(tmp_path):
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines="mean")
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)

    def trainer():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return ExplanationRegularizedTrainer(
            net, optimizer, [regularizer], checkpoint_dir=tmp_path, show_progress=False
        )

    trainer().fit(loader, epochs=1)
    measured = regularizer.baselines
    for epochs in (2, 3):
        again = trainer()
        again.resume()
        assert len(again.fit(loader, epochs=epochs)) == epochs
        torch.testing.assert_close(regularizer.baselines, measured)


def test_resume_from_an_earlier_checkpoint_removes_the_later_ones(tmp_path):
    folder, earlier = tmp_path / "run", tmp_path / "earlier.pt"
    trainer, loaders = trainer_of(folder, checkpoint_every=1)
    trainer.fit(*loaders, epochs=1)
    shutil.copy(sorted(folder.iterdir())[0], earlier)  # after update 3 of 4
    trainer, loaders = trainer_of(folder, checkpoint_every=1)
    trainer.resume()
    trainer.fit(*loaders, epochs=3)
    assert [path.name for path in sorted(folder.iterdir())] == ["checkpoint-000000011.pt", "checkpoint-000000012.pt"]
    trainer, loaders = trainer_of(folder, checkpoint_every=1)
    trainer.resume(earlier)
    trainer.fit(*loaders, epochs=2)
    assert [path.name for path in sorted(folder.iterdir())] == ["checkpoint-000000007.pt", "checkpoint-000000008.pt"]


def test_resume_of_a_finished_run_trains_only_additional_epochs(tmp_path):
    trainer, loaders = trainer_of(tmp_path)
    trainer.fit(*loaders, epochs=2)
    again, loaders = trainer_of(tmp_path)
    again.resume(tmp_path)
    assert len(again.fit(*loaders, epochs=2)) == 2
    for ours, theirs in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    more, loaders = trainer_of(tmp_path)
    more.resume()
    assert [row["epoch"] for row in more.fit(*loaders, epochs=3)] == [1, 2, 3]


def train_slowly(folder):
    """Resume, if there is something to resume, and train to the end, in a process that may be killed."""

    def slow(descriptor):  # a wide window in which a checkpoint is half written
        time.sleep(0.01)
        flush(descriptor)

    torch.set_num_threads(1)
    flush, os.fsync = os.fsync, slow
    trainer, loaders = trainer_of(folder, checkpoint_every=1)
    try:
        trainer.resume()
    except CheckpointError as error:
        if "There is no checkpoint" not in str(error):
            raise
    trainer.fit(*loaders, epochs=3)
    torch.save(trainer.model.state_dict(), folder / "final.pt")


def test_resume_after_repeated_sigkill_equals_an_uninterrupted_run(tmp_path):
    whole, loaders = trainer_of(None)
    whole.fit(*loaders, epochs=3)
    folder = tmp_path / "checkpoints"
    moments = random.Random(0)
    kills = 0
    for _ in range(5):
        process = CONTEXT.Process(target=train_slowly, args=(folder,))
        seen = max(folder.glob("*"), key=lambda path: path.stat().st_mtime, default=None)
        process.start()
        deadline = time.monotonic() + 60
        while process.exitcode is None and time.monotonic() < deadline:  # until it has begun to write
            newest = max(folder.glob("*"), key=lambda path: path.name, default=None)
            if newest is not None and newest != seen:
                break
            time.sleep(0.002)
        process.join(timeout=moments.uniform(0.0, 0.3) if kills < 3 else 60)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert (folder / "final.pt").exists()
    assert kills >= 2
    final = torch.load(folder / "final.pt", weights_only=True)
    assert all(torch.equal(final[name], value) for name, value in whole.model.state_dict().items())


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints of a short run."""
    trainer, loaders = trainer_of(tmp_path)
    trainer.fit(*loaders, epochs=2)
    return tmp_path


def paths(folder):
    return sorted(folder.glob("checkpoint-*.pt"))


def test_checkpoint_dir_keeps_only_the_last_two_checkpoints(tmp_path):
    trainer, loaders = trainer_of(tmp_path, checkpoint_every=1)
    (tmp_path / "checkpoint-000000007.123.tmp").write_bytes(b"left over by a process that was killed")
    trainer.fit(*loaders, epochs=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-000000007.pt", "checkpoint-000000008.pt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"",
        lambda content: b"PK\x03\x04 another program's file",
    ],
    ids=["half", "a byte short", "a bit changed", "empty", "foreign"],
)
def test_load_latest_falls_back_to_the_previous_intact_checkpoint(folder, damage):
    older, newer = paths(folder)
    newer.write_bytes(damage(newer.read_bytes()))
    state, found = checkpoint.load_latest(folder)
    assert found == older
    assert state["run"]["position"] == [2, 0, 4]
    with pytest.raises(CheckpointError, match=r"cut short or changed|is no checkpoint"):
        checkpoint.load(newer)
    older.write_bytes(damage(older.read_bytes()))
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is good"):
        checkpoint.load_latest(folder)


def test_load_distinguishes_another_format_from_a_foreign_file(folder):
    path = paths(folder)[0]
    path.write_bytes(path.read_bytes().replace(b"checkpoint 6\n", b"checkpoint 3\n", 1))
    with pytest.raises(CheckpointError, match="another format: resume with the version that wrote it"):
        checkpoint.load(path)


def test_load_never_runs_code_in_a_checkpoint(folder):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(folder / "run"),)

    payload = io.BytesIO()
    torch.save({"model": Evil()}, payload)
    digest = hashlib.sha256(payload.getvalue()).hexdigest().encode()
    path = folder / "checkpoint-000000099.pt"
    path.write_bytes(b"captum-idexpo checkpoint 6\n" + digest + b"\n" + payload.getvalue())
    with pytest.raises(CheckpointError, match="cannot be loaded without running code"):
        checkpoint.load(path)
    assert not (folder / "run").exists()


def test_save_on_a_full_disk_leaves_the_last_checkpoint_untouched(folder, monkeypatch):
    before = [path.read_bytes() for path in paths(folder)]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    trainer, loaders = trainer_of(folder)
    trainer.resume()
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left.*untouched.*resume"):
        trainer.fit(*loaders, epochs=3)
    assert [path.read_bytes() for path in paths(folder)] == before
    assert not list(folder.glob("*.tmp"))


def test_resume_refuses_another_model_and_missing_checkpoints(folder):
    other = torch.nn.Linear(3, 2)
    trainer = ExplanationRegularizedTrainer(other, torch.optim.SGD(other.parameters(), lr=0.1), show_progress=False)
    with pytest.raises(CheckpointError, match="belongs to another model, optimizer, scheduler or set of regularizers"):
        trainer.resume(folder)
    with pytest.raises(ValueError, match="needs a path"):
        trainer.resume()
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        trainer.resume(folder / "nowhere")


def test_checkpoint_holds_the_names_of_the_users_model(folder):
    state = checkpoint.load(paths(folder)[-1])
    assert list(state["model"]) == list(smooth_conv_net().state_dict())
    assert state["run"]["history"][0]["sparsity_weight"] > 0


def test_fit_refuses_to_overwrite_checkpoints_of_another_run(folder):
    trainer, loaders = trainer_of(folder)
    with pytest.raises(CheckpointError, match=r"another run: call resume\(\)"):
        trainer.fit(*loaders, epochs=1)


def test_save_converts_numpy_numbers_to_python_numbers(tmp_path):
    path = checkpoint.save(
        {"lr": np.float64(0.5), "rows": [{"a": np.int64(3)}], "pair": (np.float32(1), 2)}, tmp_path, 1
    )
    assert checkpoint.load(path) == {"lr": 0.5, "rows": [{"a": 3}], "pair": (1.0, 2)}


def test_save_refuses_values_that_could_not_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be loaded without running code"):
        checkpoint.save({"model": Path()}, tmp_path, 1)
    assert not list(tmp_path.glob("*"))


def test_resume_with_a_refused_checkpoint_changes_nothing(folder):
    trainer, _ = trainer_of(folder)
    with torch.no_grad():
        trainer.model[0].weight.add_(1)
    before = [tensor.clone() for tensor in trainer.model.state_dict().values()]
    without = ExplanationRegularizedTrainer(
        trainer.model,
        torch.optim.Adam(trainer.model.parameters(), lr=0.01),
        trainer.regularizers,
        checkpoint_dir=folder,
        show_progress=False,
    )
    with pytest.raises(CheckpointError, match="its scheduler is StepLR, this one's None"):
        without.resume()
    others = [*trainer.regularizers[:1], *trainer.regularizers[:1]]
    other = ExplanationRegularizedTrainer(
        trainer.model, torch.optim.Adam(trainer.model.parameters()), others, scheduler=trainer.scheduler
    )
    with pytest.raises(
        CheckpointError, match=r"its list of regularizers is \['InsertionDeletion', 'Sparsity'\], this one"
    ):
        other.resume(folder)
    trainer.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    groups = [group["lr"] for group in trainer.optimizer.param_groups]
    with pytest.raises(CheckpointError, match="belongs to another model"):
        trainer.resume()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == groups
    for ours, theirs in zip(trainer.model.state_dict().values(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_resume_refuses_a_checkpoint_dir_that_holds_another_run(tmp_path, folder):
    trainer, loaders = trainer_of(tmp_path / "other")
    trainer.fit(*loaders, epochs=3)
    before = paths(tmp_path / "other")
    trainer, _ = trainer_of(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"checkpoints of another run than .*choose another checkpoint_dir"):
        trainer.resume(folder)
    assert paths(tmp_path / "other") == before


def test_checkpoint_dir_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        trainer, loaders = trainer_of(tmp_path / name)
        before = trainer.model[4].weight.clone()
        with pytest.raises(CheckpointError, match=r"cannot be written to .*choose another checkpoint_dir"):
            trainer.fit(*loaders)
        assert torch.equal(trainer.model[4].weight, before)


class Tempered(nn.Module):
    """A loss that learns: cross-entropy at a temperature."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, output, target):
        return nn.functional.cross_entropy(output * self.scale.exp(), target)


def test_resume_restores_learned_parameters_of_the_loss(tmp_path):
    def run(folder, epochs):
        net, loss_fn = smooth_conv_net(), Tempered()
        optimizer = torch.optim.Adam([*net.parameters(), *loss_fn.parameters()], lr=0.05)
        trainer = ExplanationRegularizedTrainer(net, optimizer, [], loss_fn, checkpoint_dir=folder, show_progress=False)
        if folder is not None and any(folder.iterdir()):
            trainer.resume()
        trainer.fit([(X, Y)] * 2, epochs=epochs)
        return loss_fn.scale.detach(), net[4].weight.detach()

    whole = run(None, 2)
    run(tmp_path, 1)
    for ours, theirs in zip(run(tmp_path, 2), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_output_check_of_a_regularizer_leaves_random_streams_unchanged(tmp_path):
    """Dropout that nothing holds, since the forward function is no module."""

    def run(folder, epochs):
        net = smooth_conv_net().train()
        torch.manual_seed(0)
        prior = Smoothness(Saliency(lambda x: net(x)), eval_mode=False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        trainer = ExplanationRegularizedTrainer(net, optimizer, [prior], checkpoint_dir=folder, show_progress=False)
        if folder is not None and any(folder.iterdir()):
            trainer.resume()
        trainer.fit([(X, Y)] * 2, epochs=epochs)
        return net[4].weight.detach()

    expected = run(None, 2)
    run(tmp_path, 1)
    assert torch.equal(run(tmp_path, 2), expected)


def test_resume_at_the_end_of_an_epoch_draws_no_extra_random_numbers(tmp_path, killed):
    class Dropping(nn.Module):
        """A model that draws in any mode."""

        def __init__(self):
            super().__init__()
            self.net = smooth_conv_net()

        def forward(self, x):
            return self.net(nn.functional.dropout(x, 0.5, training=True))

    def trainer(folder):
        model = Dropping()
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"checkpoint_dir": folder, "checkpoint_every": 1, "show_progress": False}
        return ExplanationRegularizedTrainer(model, optimizer, **settings)

    whole = trainer(None)
    expected = whole.fit([(X, Y)] * 2, epochs=2)
    killed(trainer(tmp_path), [(X, Y)] * 2, epochs=2, after=2)  # the epoch's last update
    resumed = trainer(tmp_path)
    resumed.resume()
    assert without_times(resumed.fit([(X, Y)] * 2, epochs=2)) == without_times(expected)


def test_resume_with_a_refused_scheduler_leaves_the_optimizer_unchanged(folder):
    trainer, _ = trainer_of(folder)
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.7)
    for scheduler, message in (
        (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3), "its scheduler is StepLR, this one's CosineAnneal"),
        (Broken(optimizer, 1), "no such state"),
    ):
        other = ExplanationRegularizedTrainer(
            trainer.model, optimizer, trainer.regularizers, scheduler=scheduler, show_progress=False
        )
        with pytest.raises(CheckpointError, match=message):
            other.resume(folder)
        assert [group["lr"] for group in optimizer.param_groups] == [0.7]
        assert not optimizer.state


class Broken(torch.optim.lr_scheduler.StepLR):
    def load_state_dict(self, state):
        raise ValueError("no such state")


Broken.__name__ = "StepLR"


def test_resume_accepts_a_copy_when_all_checkpoints_are_damaged(tmp_path, folder):
    copies = tmp_path / "copies"
    copies.mkdir()
    kept = shutil.copy(paths(folder)[-1], copies)
    for path in paths(folder):
        path.write_bytes(path.read_bytes()[:-100])
    trainer, loaders = trainer_of(folder)
    trainer.resume(kept)
    assert len(trainer.fit(*loaders, epochs=3)) == 3


def test_resume_refuses_another_loss_fn(tmp_path):
    def trainer(loss_fn):
        net = smooth_conv_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        settings = {"checkpoint_dir": tmp_path, "show_progress": False}
        return ExplanationRegularizedTrainer(net, optimizer, [], loss_fn, **settings)

    trainer(nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64))).fit([(X, Y)])
    with pytest.raises(CheckpointError, match="its loss_fn is CrossEntropyLoss, this one's None"):
        trainer(nn.functional.cross_entropy).resume()


def test_resume_within_the_first_epoch_restarts_persistent_workers(tmp_path, killed):
    def trainer_and_loader(folder):
        net = smooth_conv_net().train()
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        settings = {"checkpoint_dir": folder, "checkpoint_every": 1, "show_progress": False}
        trainer = ExplanationRegularizedTrainer(net, optimizer, **settings)
        data = TensorDataset(X, Y)
        return trainer, DataLoader(data, 5, shuffle=True, num_workers=1, persistent_workers=True)

    whole, loader = trainer_and_loader(None)
    expected = whole.fit(loader, epochs=2)
    trainer, loader = trainer_and_loader(tmp_path)
    killed(trainer, loader, epochs=2, after=2)
    resumed, loader = trainer_and_loader(tmp_path)
    resumed.resume()
    assert without_times(resumed.fit(loader, epochs=2)) == without_times(expected)
