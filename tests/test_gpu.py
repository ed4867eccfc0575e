"""What only a GPU shows; skipped where there is none."""
import pytest
import torch

from checkpoint import save_model
from model.edsr import EDSR
from test_distributed import CASES, make_small, make_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("case", CASES)
def test_a_step_never_waits_for_the_gpu(monkeypatch, case):
    make_small(monkeypatch)
    trainer = make_trainer(CASES[case], "cuda")
    hr, lr = (torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8).pin_memory() for side in (32, 16))
    trainer.step(lr, hr)  # the first makes what is kept
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(lr, hr)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["single", "bf16", "half"])
def test_a_run_on_the_gpu_continues(run_main, tiny_data, tmp_path, precision):
    save_model(EDSR(2, n_resblocks=3, n_feats=12), tmp_path / "teacher.pt")
    line = (f"--dir_data {tiny_data} --data_train tiny --data_test tiny --scale 2 --model EDSR --n_resblocks 1 --n_feats 8 "
            f"--patch_size 24 --batch_size 4 --test_every 6 --n_threads 2 --teacher {tmp_path / 'teacher.pt'} "
            f"--loss 1*DS+1*TS+10*SA --precision {precision} --chop --ckp_dir {tmp_path / 'run'} ")
    assert run_main("train", line + "--epochs 1")[0] == 0
    status, out, _ = run_main("train", line + "--epochs 2 --resume 1")
    assert status == 0 and not [text for text in out if "using the CPU" in text]
