"""--metrics: metrics of the package pyiqa, in whose place there is a module with its interface here."""
import csv
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from checkpoint import save_model
from model.edsr import EDSR
from perceptual import make_metrics
from system.errors import UserError

PYIQA = '''
import torch

class Metric(torch.nn.Module):
    """lpips: mean absolute difference; niqe: mean of the image."""

    def __init__(self, name):
        super().__init__()
        self.name, self.metric_mode, self.lower_better = name, "NR" if name == "niqe" else "FR", name != "other"

    def forward(self, target, ref=None):
        assert target.dtype == torch.float32 and target.ndim == 4 and target.min() >= 0 and target.max() <= 1
        assert self.name != "other", "Input must be\\nlarger"
        return (target.mean() if ref is None else (target - ref).abs().mean())[None]

def create_metric(metric_name, as_loss=False, device=None, **kwargs):
    assert metric_name in ("lpips", "niqe", "other"), f"Metric {metric_name} not implemented yet."
    return Metric(metric_name).to(device)
'''


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(text) -> puts a module pyiqa with that text on the path, or none for None."""
    def put(text=PYIQA):
        monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
        if text is None:
            monkeypatch.setitem(sys.modules, "pyiqa", None)
        else:
            (tmp_path / "site").mkdir()
            (tmp_path / "site" / "pyiqa.py").write_text(text)
            monkeypatch.syspath_prepend(tmp_path / "site")
    yield put
    sys.modules.pop("pyiqa", None)


@pytest.fixture
def flags(tiny_data, tmp_path):
    torch.manual_seed(0)
    save_model(EDSR(2, n_resblocks=1, n_feats=4), tmp_path / "net.pt")
    return f"--cpu --n_threads 0 --dir_data {tiny_data} --dir_cache {tmp_path / 'cache'} --ckp_dir {tmp_path / 'out'} "


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_scores_are_those_of_the_saved_images(install, run_main, flags, tiny_data, tmp_path):
    install()
    status, out, err = run_main("test", flags + f"--ckp_path {tmp_path / 'net.pt'} --data_test tiny --save_results "
                                "--metrics lpips+niqe")
    assert status == 0, err
    rows = rows_of(tmp_path / "out" / "results-tiny" / "images.csv")
    for row in rows:
        sr = iio.imread(tmp_path / "out" / "results-tiny" / f"{row['image']}_x2_SR.png") / 255
        hr = iio.imread(tiny_data / "tiny" / "HR" / f"{row['image']}.png") / 255
        assert float(row["lpips"]) == pytest.approx(np.abs(sr - hr).mean(), abs=2e-6)
        assert float(row["niqe"]) == pytest.approx(sr.mean(), abs=2e-6)
    header = next(line for line in out if line.startswith("dataset")).split()
    values = out[out.index(next(line for line in out if line.startswith("dataset"))) + 1].split()
    assert header == ["dataset", "images", "PSNR", "SSIM", "lpips", "niqe", "ms/image"] and len(rows) == 4
    assert float(values[4]) == pytest.approx(np.mean([float(row["lpips"]) for row in rows]), abs=6e-5)


def test_images_without_HR_have_the_metrics_that_need_none(install, run_main, flags, tiny_data, tmp_path):
    install()
    status, out, err = run_main("test", flags + f"--ckp_path {tmp_path / 'net.pt'} --data_test Demo --dir_demo "
                                f"{tiny_data / 'tiny' / 'HR'} --metrics niqe+lpips")
    assert status == 0, err
    rows = rows_of(tmp_path / "out" / "results-Demo" / "images.csv")
    assert len(rows) == 4 and rows[0].keys() == {"checkpoint", "epoch", "dataset", "scale", "image", "niqe"}
    line = next(line for line in out if line.startswith("Demo")).split()
    assert line[2:4] == ["-", "-"] and line[5] == "-"  # PSNR, SSIM, LPIPS
    assert float(line[4]) == pytest.approx(np.mean([float(row["niqe"]) for row in rows]), abs=6e-5)


def test_compare_and_training_have_the_metrics_in_their_tables(install, run_main, flags, tmp_path):
    install()
    status, out, err = run_main("compare", flags + f"--ckp_path net={tmp_path / 'net.pt'} --data_test tiny --metrics lpips")
    assert status == 0, err
    rows = rows_of(tmp_path / "out" / "compare.csv")
    assert list(rows[0])[2:6] == ["psnr", "ssim", "lpips", "parameters"] and all(float(row["lpips"]) > 0 for row in rows)
    assert [line.split()[-4] for line in out if line.startswith(("network", "net "))] == ["lpips", rows[1]["lpips"]]
    train = (flags + f"--pre_train {tmp_path / 'net.pt'} --model EDSR --n_resblocks 1 --n_feats 4 --scale 2 --loss 1*DS "
             "--data_train tiny --data_test tiny --test_every 1 --batch_size 1 --patch_size 16 --lr 1e-9 ")
    for epochs in (1, 2):  # the second continues the first
        status, _, err = run_main("train", f"{train} --resume auto --ckp_dir {tmp_path / 'run'} --metrics lpips "
                                  f"--epochs {epochs}")
        assert status == 0, err
    metrics = rows_of(tmp_path / "run" / "metrics.csv")
    assert len(metrics) == 2 and [float(row["lpips"]) for row in metrics] == pytest.approx(
        [float(rows[1]["lpips"])] * 2, abs=1e-4)


@pytest.mark.parametrize("text, words", [
    (None, ("pyiqa is not installed", "pip install pyiqa")), ("import torchvision_missing", ("torchvision_missing",)),
    ("raise RuntimeError('operator torchvision::nms does not exist')", ("torchvision::nms", "cannot be imported"))])
def test_a_package_that_is_missing_or_broken_is_one_line(install, run_main, flags, tmp_path, text, words):
    install(text)
    status, _, err = run_main("test", flags + f"--ckp_path {tmp_path / 'net.pt'} --data_test tiny --metrics lpips+niqe")
    assert status == 2 and len(err) == 1 and all(word in err[0] for word in ("--metrics lpips+niqe", *words))


@pytest.mark.parametrize("names, words", [
    ("lpisp", "Metric lpisp not implemented yet"), ("psnr", "always computed"), ("niqe+niqe", "duplicate niqe"),
    ("niqe+", "not a list"), ("other", "0.png: other cannot be computed on 64 x 56 pixels (Input must be")])
def test_a_wrong_metric_is_one_line(install, run_main, flags, tmp_path, names, words):
    install()
    status, _, err = run_main("test", flags + f"--ckp_path {tmp_path / 'net.pt'} --data_test tiny --metrics {names}")
    assert status == 2 and words in err[-1] and not any("Traceback" in line for line in err)


def test_without_metrics_the_package_is_not_imported(install):
    install(None)
    assert make_metrics([], torch.device("cpu")) == []
    with pytest.raises(UserError):
        make_metrics(["niqe"], torch.device("cpu"))
