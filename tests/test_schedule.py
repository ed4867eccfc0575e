"""The learning rate as a function of the iteration: steps by epochs and by iterations, cosine, warm-up."""
import math

import pytest
import torch

import option
from schedule import learning_rate, make_optimizer


def rates(line, count):
    args = option.parse(f"--lr 1 --gamma 0.5 --epochs 5 --test_every 4 {line}".split())
    return [learning_rate(args, iteration) for iteration in range(count)]


def test_steps_by_epochs_and_by_iterations():
    assert rates("--decay 2-4", 20) == [1] * 4 + [0.5] * 8 + [0.25] * 8
    assert rates("--decay 3-6it", 20) == [1] * 3 + [0.5] * 3 + [0.25] * 14


@pytest.mark.parametrize("epoch, rate", [(1, 1e-4), (149, 1e-4), (150, 5e-5), (151, 5e-5), (299, 5e-5), (300, 2.5e-5)])
def test_the_published_decay_acts_in_the_epoch_that_it_names_counted_from_1(epoch, rate):
    """FAKD and EDSR-PyTorch step their scheduler before an epoch: 150..200 run at half of the rate."""
    args = option.parse(["--decay", "150-300-450-600", "--epochs", "700"])
    assert [learning_rate(args, k) for k in ((epoch - 1) * 1000, epoch * 1000 - 1)] == pytest.approx([rate, rate])


def test_cosine_is_whole_at_the_start_and_ends_near_0():
    assert rates("--decay cosine", 20) == pytest.approx([(1 + math.cos(math.pi * k / 20)) / 2 for k in range(20)])


def test_cosine_ends_at_lr_end():
    found = rates("--decay cosine --lr_end 0.1 --warmup 4", 20)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert found[4:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * k / 16)) / 2 for k in range(16)])
    assert rates("--decay cosine --lr_end 0", 20) == rates("--decay cosine", 20)


def test_warm_up_rises_to_the_whole_rate_and_cosine_begins_after_it():
    assert rates("--decay 9it --warmup 4", 12) == pytest.approx([0.25, 0.5, 0.75, 1] + [1] * 5 + [0.5] * 3)
    assert rates("--decay 2it --warmup 4", 5) == pytest.approx([0.25, 0.5, 0.375, 0.5, 0.5])
    found = rates("--decay cosine --warmup 4", 20)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert found[4:] == pytest.approx([(1 + math.cos(math.pi * k / 16)) / 2 for k in range(16)])


def test_cosine_begins_at_decay_from():
    """Restormer's schedule: the full learning rate for 92,000 of 300,000 iterations, then half a cosine."""
    found = rates("--decay cosine --decay_from 8 --lr_end 0.1 --warmup 2", 20)
    assert found[:8] == [0.5] + [1] * 7
    assert found[8:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)])


@pytest.mark.parametrize("line, words", [("--decay_from 5", "--decay cosine, which is not given"),
                                         ("--decay cosine --decay_from 9 --epochs 1 --test_every 9", "shorter than the run"),
                                         ("--decay 200-100it", "rising"), ("--decay it", "neither cosine"),
                                         ("--decay 1e5it", "neither cosine"), ("--decay 0it", "neither cosine"),
                                         ("--warmup 2000 --epochs 2 --test_every 1000", "shorter than the run"),
                                         ("--warmup -1", "whole number in 0"),
                                         ("--lr_end 1e-6", "--decay cosine, which is not given"),
                                         ("--decay cosine --lr 1e-4 --lr_end 1e-3", "must not be larger than --lr 0.0001"),
                                         ("--decay cosine --lr_end -1", "0 or more"),
                                         ("--upcycle_every 3", "--upcycle, which is not given"),
                                         ("--upcycle zoom_out --upcycle_every 0", "whole number in 1")])
def test_a_schedule_that_cannot_be_gets_a_line(line, words, capsys):
    with pytest.raises(SystemExit):
        option.parse(line.split())
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_the_configuration_says_it_as_it_was_given():
    assert str(option.parse(["--decay", "100000-200000it"]).decay) == "100000-200000it"
    assert option.parse(["--template", "DUKD"]).decay == [100000, 200000]


def test_the_weight_decay_of_ADAMW_is_decoupled_from_the_gradient():
    """One step of AdamW is the step of Adam without weight decay from weights that are smaller by lr * weight_decay."""
    start, found = torch.randn(5, generator=torch.Generator().manual_seed(0)), {}
    for name, factor, line in (("AdamW", 1, "--optimizer ADAMW --weight_decay 0.1"), ("Adam", 1 - 0.01 * 0.1, ""),
                               ("L2", 1, "--weight_decay 0.1"), ("without", 1, "--optimizer ADAMW")):
        weights = torch.nn.Parameter(start * factor)
        optimizer = make_optimizer(option.parse(f"--lr 0.01 --betas 0.8,0.9 {line}".split()), [weights])
        weights.grad = torch.arange(1.0, 6)
        optimizer.step()
        found[name] = weights.detach()
    assert torch.allclose(found["AdamW"], found["Adam"], rtol=1e-6, atol=1e-8)
    assert torch.allclose(found["L2"], found["without"], rtol=1e-6, atol=1e-6)  # the first step of Adam has one length
    assert not torch.allclose(found["AdamW"], found["without"], rtol=1e-5)
