"""Cached teacher outputs: what is kept, what the crops contain, that no teacher runs in the loop, interrupted builds."""
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import data
import option
from checkpoint import save_model
from data import Crops, teacher_cache
from data.cache import Store
from data.dataset import orient
from data.teacher_cache import decode, encode
from inference import chop, upscale
from model import load_model
from model.edsr import EDSR
from test_training import TINY, rows, teacher  # noqa: F401 - a fixture


@pytest.fixture
def root(tiny_data, tmp_path):
    """A data root of its own, whose cache is empty."""
    shutil.copytree(tiny_data / "tiny" / "HR", tmp_path / "data" / "tiny" / "HR")
    return tmp_path / "data"


@pytest.fixture
def flags(root, tmp_path):
    return (f"{TINY} --dir_data {root} --data_train tiny --data_test tiny --n_threads 0 --ckp_dir {tmp_path / 'run'} "
            "--epochs 1 --test_every 3 ")


@pytest.fixture
def calls(monkeypatch):
    """What EDSR, the teacher in these tests, is run on: a list of (images, height, width)."""
    seen, forward = [], EDSR.forward

    def counted(self, lr, features=False):
        seen.append((len(lr), *lr.shape[2:]))
        return forward(self, lr, features)
    monkeypatch.setattr(EDSR, "forward", counted)
    return seen


def outputs(root):
    """The number of cached teacher outputs."""
    return sum(len(Store(index.parent, index.stem).entries) for index in (root / "tiny" / "bin").glob("SR_*.index"))


def test_fixed_point_rounds_by_a_256th_of_a_grey_level_and_keeps_what_lies_beyond_the_range():
    sr = torch.rand(3, 40, 50) * 355 - 50
    found = decode(torch.from_numpy(encode(sr))).permute(2, 0, 1)
    assert (found - sr).abs().max() <= 1 / 256 + 1e-4
    ends = torch.tensor([-1000, -128, 0, 255, 383.9921875, 1000]).view(1, 1, 6).expand(3, 1, 6)
    assert decode(torch.from_numpy(encode(ends)))[0, :, 0].tolist() == [-128, -128, 0, 255, 383.9921875, 383.9921875]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rgb_range", [255, 1])
def test_crops_contain_the_teacher_output_of_the_whole_image_cropped_and_flipped_like_HR(root, teacher, workers, rgb_range):  # noqa: F811
    line = (f"{TINY} --dir_data {root} --data_train tiny --batch_size 4 --n_threads {workers} --teacher {teacher} "
            f"--rgb_range {rgb_range}")
    args = option.parse(line.split())
    nets = [load_model(teacher), EDSR(2, n_resblocks=1, n_feats=8).eval()]
    save_model(nets[1], teacher.with_name("other.pt"))
    for net in nets:
        net.rgb_range = rgb_range
    crops = Crops(args)
    teacher_cache.cache_outputs(crops, nets, [teacher, teacher.with_name("other.pt")], torch.device("cpu"), args)
    images = crops.sets[0]
    wholes = [[decode(torch.from_numpy(np.array(images.teacher_output(index, kind, None)))) for kind in crops.teacher_kinds]
              for index in range(4)]
    for index in range(4):
        x = torch.tensor(np.array(images.lr(index))).permute(2, 0, 1)[None] * (rgb_range / 255)
        for net, whole in zip(nets, wholes[index]):
            assert torch.allclose(whole.permute(2, 0, 1) * (rgb_range / 255), chop(net, x)[0], atol=0.004 * rgb_range / 255)
    plain = Crops(args)
    for number, (lr, hr, *more) in enumerate(data.make_batches(args, crops, 0, 3)):
        assert more[0].shape == (4, 6, 24, 24) and more[0].dtype == torch.int16
        for k in range(4):
            crop = 4 * number + k
            assert torch.equal(lr[k], plain[crop][0]) and torch.equal(hr[k], plain[crop][1])
            index = crops.images[crops._image(crop)][1]
            both = np.concatenate([np.array(images.hr(index)), *[whole.numpy() for whole in wholes[index]]], 2)
            assert any(np.array_equal(part[..., :3], hr[k].permute(1, 2, 0).numpy())
                       and np.array_equal(part[..., 3:], decode(more[0][k]).permute(1, 2, 0).numpy())
                       for part in all_crops(both, 24))


def all_crops(image, size):
    for top in range(0, image.shape[0] - size + 1, 2):
        for left in range(0, image.shape[1] - size + 1, 2):
            for flips in range(8):
                yield orient(image[top:top + size, left:left + size], flips & 1, flips & 2, flips & 4)


def test_no_teacher_runs_in_the_loop(run_main, flags, teacher, calls, root):  # noqa: F811
    status, out, _ = run_main("train", flags + f"--teacher {teacher} --loss 1*DS+1*TS --cache_teacher")
    assert status == 0 and calls == [(1, 28, 32)] * 4 and outputs(root) == 4
    assert any("the teacher is not run during training" in line for line in out)
    calls.clear()
    status, _, _ = run_main("train", flags + f"--teacher {teacher} --loss 1*DS+1*TS --cache_teacher --reset")
    assert status == 0 and calls == []


def test_its_loss_is_about_that_of_a_teacher_in_the_loop(run_main, flags, teacher, tmp_path):  # noqa: F811
    losses = []
    for name, more in (("cached", "--cache_teacher"), ("running", "")):
        line = flags + f"--teacher {teacher} --loss 1*TS --lr 1e-30 --patch_size 48 {more} --ckp_dir {tmp_path / name}"
        assert run_main("train", line)[0] == 0
        losses.append(float(rows(tmp_path / name / "loss.csv")[0]["TS"]))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("more, expected, words", [
    ("--loss 1*DS+1*TS+1*LC", [(4, 12, 12)], "the teacher still runs for LC (original batch)"),
    ("--loss 1*DS+1*TS --upcycle zoom_in", [(4, 12, 12)], "the teacher still runs for TS (zoom_in)"),
    ("--loss 1*DS+1*TS --upcycle zoom_in+zoom_out --n_zoom_in 2", [(8, 12, 12), (4, 6, 6)],
     "the teacher still runs for TS (zoom_in), TS (zoom_out)"),
])
def test_what_needs_more_runs_the_teacher_and_is_named(run_main, flags, teacher, calls, more, expected, words):  # noqa: F811
    status, out, _ = run_main("train", flags + f"--teacher {teacher} {more} --cache_teacher")
    assert status == 0 and calls == [(1, 28, 32)] * 4 + expected * 3
    assert any(line.endswith(words) for line in out)


def test_where_it_spares_nothing_nothing_is_built(run_main, flags, teacher, calls, root):  # noqa: F811
    status, out, _ = run_main("train", flags + f"--teacher {teacher} --loss 1*DS+1*TS+1*SA --cache_teacher")
    assert status == 0 and calls == [(4, 12, 12)] * 3 and not outputs(root)
    assert any("has no effect: the teacher runs on every batch for SA (original batch)" in line for line in out)


def test_an_interrupted_build_goes_on_where_it_was(run_main, flags, teacher, calls, root, monkeypatch):  # noqa: F811
    line = flags + f"--teacher {teacher} --loss 1*TS --cache_teacher "
    made = teacher_cache.encode

    def interrupted(sr):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(sr)
    monkeypatch.setattr(teacher_cache, "encode", interrupted)
    assert run_main("train", line)[0] == 130
    assert outputs(root) == 2 and not list(root.rglob("*.part"))
    pack, = (root / "tiny" / "bin").glob("SR_*.pack")
    os.truncate(pack, pack.stat().st_size - 1000)
    monkeypatch.setattr(teacher_cache, "encode", made)
    calls.clear()
    assert run_main("train", line)[0] == 0 and len(calls) == 3 and outputs(root) == 4


def test_another_teacher_another_precision_or_another_image_is_computed_anew(run_main, flags, teacher, calls, root):  # noqa: F811
    line = flags + "--loss 1*TS --cache_teacher --reset "
    run_main("train", line + f"--teacher {teacher}")
    teacher.rename(teacher.with_name("renamed.pt"))
    calls.clear()
    assert run_main("train", line + f"--teacher {teacher.with_name('renamed.pt')}")[0] == 0 and not calls
    assert run_main("train", line + f"--teacher {teacher.with_name('renamed.pt')} --precision bf16")[0] == 0
    assert len(calls) == 4 and outputs(root) == 8
    assert run_main("train", line + f"--teacher {teacher.with_name('renamed.pt')} --teacher_precision bf16")[0] == 0
    assert len(calls) == 4 and outputs(root) == 8
    torch.manual_seed(3)
    save_model(EDSR(2, n_resblocks=3, n_feats=12), teacher)
    assert run_main("train", line + f"--teacher {teacher}")[0] == 0 and len(calls) == 8
    image = root / "tiny" / "HR" / "0.png"
    shutil.copy(root / "tiny" / "HR" / "1.png", image)
    image.touch()
    assert run_main("train", line + f"--teacher {teacher}")[0] == 0 and len(calls) == 9 and outputs(root) == 12


@pytest.mark.parametrize("more, words", [
    ("--loss 1*DS", "no term of 1*DS uses a teacher"),
    ("--loss 1*TS --ext img", "--ext img disables"),
    ("--loss 1*DS+1*T_DS --width_mult 0.5", "needs a fixed teacher"),
    ("self_ensemble --loss 1*TS+1*SA", "without self-ensemble, for SA (original batch)"),
    ("self_ensemble --loss 1*LC", "without self-ensemble, for LC (original batch)"),
    ("twice --loss 1*TS", "'twice'"),
])
def test_where_no_output_can_be_cached(run_main, flags, teacher, more, words, capsys):  # noqa: F811
    status, _, err = run_main("train", flags + f"--teacher {teacher} --cache_teacher {more}")
    assert status == 2 and err[-1].startswith("error: ") and words in err[-1]


def test_the_self_ensemble_is_cached_beside_the_plain_output(run_main, flags, teacher, calls, root):  # noqa: F811
    line = flags + f"--teacher {teacher} --loss 1*TS --cache_teacher "
    assert run_main("train", line)[0] == 0 and calls == [(1, 28, 32)] * 4
    assert run_main("train", line + "self_ensemble --reset")[0] == 0 and outputs(root) == 8
    assert calls[4:] == ([(1, 28, 32)] * 4 + [(1, 32, 28)] * 4) * 4
    calls.clear()
    assert run_main("train", line + "self_ensemble --reset")[0] == 0 and not calls
    args = option.parse(line.split() + ["self_ensemble"])
    crops, net = Crops(args), load_model(teacher)
    teacher_cache.cache_outputs(crops, [net], [teacher], torch.device("cpu"), args)
    images, (kind,) = crops.sets[0], crops.teacher_kinds
    x = torch.tensor(np.array(images.lr(0))).permute(2, 0, 1)[None].float()
    found = decode(torch.from_numpy(np.array(images.teacher_output(0, kind, None)))).permute(2, 0, 1)
    assert torch.allclose(found, upscale(net, x, self_ensemble=True)[0], atol=0.004)
    assert not torch.allclose(found, upscale(net, x)[0], atol=0.1)


def test_an_output_that_was_removed_is_missed(root, teacher):  # noqa: F811
    args = option.parse(f"{TINY} --dir_data {root} --data_train tiny --teacher {teacher}".split())
    crops = Crops(args)
    teacher_cache.cache_outputs(crops, [load_model(teacher)], [teacher], torch.device("cpu"), args)
    crops = pickle.loads(pickle.dumps(crops))  # what a worker gets that is spawned: it has not opened the files yet
    shutil.rmtree(root / "tiny" / "bin")
    with pytest.raises(data.dataset.UserError, match="--resume 1"):
        crops[0]
