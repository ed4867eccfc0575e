"""The flags: published command lines, presets, the loss string, and what a mistake gets."""
import subprocess
import sys

import pytest

import option
import option_types
from conftest import ROOT
from system.errors import UserError

PUBLISHED_TRAINING = (
    "--ckp_dir overall_distilation/rcan/SA_x4/ --scale 4 --teacher [RCAN] --model RCAN --alpha 0.5 --feature_loss_used 1 "
    "--feature_distilation_type 10*SA --features [1,2,3] --epochs 200 --save_results --chop --patch_size 192")
PUBLISHED_TESTING = "--ckp_path x.pt --TS S --scale 4 --model RCAN --n_resgroups 10 --n_resblocks 6"


def parse(line=""):
    return option.parse(line.split())


def test_the_published_training_command_says_what_it_says():
    args = parse(PUBLISHED_TRAINING)
    assert (args.scale, args.teacher, args.model, args.epochs, args.patch_size) == (4, ["RCAN"], "RCAN", 200, 192)
    assert args.loss == "0.5*DS+0.5*TS+10*SA" and args.features == [1, 2, 3]
    assert args.chop and args.save_results


def test_the_published_testing_command_is_accepted():
    args = parse(PUBLISHED_TESTING)
    assert args.ckp_path == "x.pt" and args.n_resblocks == 6 and {"scale", "n_resgroups"} <= args.given


@pytest.mark.parametrize("line, loss", [
    ("--alpha 0 --feature_loss_used 0", "1*DS"),
    ("--alpha 1 --feature_loss_used 0", "1*TS"),
    ("--alpha 0.25 --feature_distillation_type 10*SA+1*CA", "0.75*DS+0.25*TS+10*SA+1*CA"),
    ("--loss 1*DS+0.1*DCR", "1*DS+0.1*DCR"),
])
def test_published_flags_become_the_loss_string(line, loss):
    assert parse(line).loss == loss


def test_a_loss_string_is_read_term_by_term():
    assert option_types.parse_loss("0.5*DS+1*NCE+1e-3*GAN+1.e+2*SA+TS") == [
        (0.5, "DS"), (1, "NCE"), (1e-3, "GAN"), (100, "SA"), (1, "TS")]


def test_explicit_flags_win_over_a_preset_and_later_presets_over_earlier_ones():
    args = parse("--template FAKD+EDSR --lr 3e-4")
    assert (args.lr, args.n_resblocks, args.features, args.decay) == (3e-4, 32, [1, 2, 3], [150, 300, 450, 600])


def test_a_flag_equal_to_its_default_still_wins_over_a_preset():
    assert parse("--template CSD --epochs 200").epochs == 200


@pytest.mark.parametrize("template, loss", [
    ("CSD+FAKD", "0.5*DS+0.5*TS+10*SA"), ("FAKD+CSD", "1*DS+200*CSD+1*T_DS"), ("CSD+EDSR", "1*DS+200*CSD+1*T_DS")])
def test_the_last_preset_with_a_loss_says_it(template, loss):
    assert parse(f"--template {template}").loss == loss


def test_a_later_network_leaves_no_size_of_an_earlier_one():
    args = parse("--template EDSR+CARN")
    assert (args.model, args.n_resblocks, args.res_scale, args.n_feats, args.group) == ("CARN", None, None, 64, 1)


def test_a_width_from_a_preset_is_said_of_the_file_where_nothing_is_trained():
    assert "width_mult" not in parse("--template CSD").given
    assert option.parse(["--template", "CSD"], training=False).given == {"template", "width_mult"}


def test_the_multiple_of_the_scale_matters_only_to_training():
    assert option.parse(["--patch_size", "7"], training=False).patch_size == 7


def test_home_folders_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse("--dir_demo ~/a --ckp_path ~/b.pt --pre_train ~/c --teacher ~/d.pt+RCAN --vgg_path ~/e --dir_cache ~/f")
    assert (args.dir_demo, args.ckp_path, args.pre_train) == ("/home/me/a", "/home/me/b.pt", "/home/me/c")
    assert (args.teacher, args.vgg_path, args.dir_cache) == (["/home/me/d.pt", "RCAN"], "/home/me/e", "/home/me/f")


@pytest.mark.parametrize("string, nets", [
    ("", {}), ("a.pt", {"a.pt": "a.pt"}), ("x=a.pt+b/y.pt", {"x": "a.pt", "y.pt": "b/y.pt"}),
    ("A/m.pt+B/m.pt", {"A/m.pt": "A/m.pt", "B/m.pt": "B/m.pt"}),
    ("/r/A/model/m.pt+/r/B/model/m.pt+RCAN", {"A/model/m.pt": "/r/A/model/m.pt", "B/model/m.pt": "/r/B/model/m.pt",
                                              "RCAN": "RCAN"})])
def test_checkpoints_are_called_by_their_label_or_what_tells_them_apart(string, nets):
    assert option_types.parse_labelled(string) == nets


@pytest.mark.parametrize("string", ["a++b", "x=a+x=b", "a.pt+a.pt", "x=", "x=+b"])
def test_a_wrong_list_of_checkpoints_gets_one_line(string):
    with pytest.raises(UserError, match="--ckp_path"):
        option_types.parse_labelled(string)


def test_help_says_no_empty_defaults():
    text = " ".join(option.make_parser().format_help().split())
    assert "(default: 192)" in text and not any(f"(default: {word})" in text for word in ("None", "False", ""))


def test_the_teacher_is_the_students_network_unless_named():
    assert parse("--model EDSR").teacher == ["EDSR"]
    assert parse("--teacher [RCAN,SAN]").teacher == ["RCAN", "SAN"]
    assert parse("--teacher a/b.pt+c.pth").teacher == ["a/b.pt", "c.pth"]


def test_a_plus_in_the_name_of_an_existing_file_separates_nothing(tmp_path):
    file = tmp_path / "a+b.pt"
    file.touch()
    assert parse(f"--teacher {file}").teacher == [str(file)]


@pytest.mark.parametrize("line, words", [
    ("--features [1,4]", "0 to 3"),
    ("--features __import__('os')", "list such as"),
    ("--features [1,1]", "at most once"),
    ("--loss 0.5*DS+", "WEIGHT*TERM"),
    ("--loss 1*DS+2*DS", "duplicate term DS"),
    ("--loss 1*DS --alpha 0.3", "--alpha"),
    ("--alpha 1.5", "0..1"),
    ("--template FAKE", "FAKD"),
    ("--patch_size 97 --scale 2", "multiple"),
    ("--scale 5", "invalid choice"),
    ("--decay 200-100", "rising"),
    ("--betas 0.9", "pair"),
    ("--betas 0.9,1.5", "0..1"),
    ("--epochs 0", "1..1000000000"),
    ("--history_every cosine", "whole number"),
    ("--lr nan", "above 0"),
    ("--resume 1 --reset", "--reset"),
    ("--save_gt", "--save_results"),
    ("--chop_mem 2", "--chop"), ("--chop --chop_mem 0", "above 0"), ("--chop --chop_mem 4GB", "finite number"),
    ("--no_such_flag", "--no_such_flag"),
    ("--feat [1]", "--feat"),
    ("--template +", "not a preset"), ("--template FAKD+", "not a preset"),
    ("--template CARN_M --model RCAN", "--template CARN_M"),
    ("--alpha nan", "0..1"), ("--gamma inf", "at most 1"), ("--gamma 1.5", "at most 1"),
    ("--momentum 1", "excluded"), ("--epsilon 0", "above 0"),
    ("--weight_decay -1", "0 or more"), ("--gclip nan", "0 or more"), ("--grad_norm -1", "0 or more"),
    ("--save_every -1", "0 or more"),
    ("--rbf_gamma nan", "above 0"), ("--res_scale inf", "0 or more"), ("--img_range nan", "above 0"),
    ("--seed 9223372036854775808", "2^63"), ("--n_threads 65", "0..64"), ("--P 101", "0..100"), ("--lr 1e300", "finite"),
    ("--rgb_range 1e9", "65535"), ("--batch_size 1000000000000", "65536"), ("--loss 1e999*DS", "finite"),
    ("--data_train A++B", "list such as"), ("--data_train ,", "list such as"), ("--data_test Set5+", "list such as"),
    ("--data_test A+B+A", "duplicate A"), ("--dir_demo ~nobody_here/x", "no home folder ~nobody_here"),
    ("--ckp_dir=", "folder of all runs"), ("--ckp_dir cache", "another name"), ("--ckp_dir ./cache/x", "decoded"),
])
def test_a_mistake_gets_one_line_and_status_2(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(line)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("line, value", [
    ("--depths [6,6,6,6]", [6, 6, 6, 6]), ("--num_heads 6,6", [6, 6]), ("--multi_scale 2+3+4", [2, 3, 4]),
    ("--RDNconfig B", "B"), ("--RDNconfig 16,8,64", "B"), ("--RDNconfig (20,6,32)", "A"), ("--RDNconfig 4,3,16", "4,3,16"),
    ("--mlp_ratio 2.75", 2.75), ("--upsampler nearest+conv", "nearest+conv"), ("--G0 32", 32)])
def test_sizes_of_networks(line, value):
    assert getattr(parse(line), line[2:].split()[0]) == value


@pytest.mark.parametrize("line, words", [
    ("--depths [6,x]", "whole number"), ("--depths [6,0]", "1..65536"), ("--num_heads __import__('os')", "whole number"),
    ("--multi_scale 2++4", "list such as"), ("--RDNconfig C", "D,C,G"), ("--RDNconfig 16,0,64", "D,C,G"),
    ("--upsampler bicubic", "pixelshuffle")])
def test_a_wrong_size_gets_one_line(line, words, capsys):
    with pytest.raises(SystemExit):
        parse(line)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_every_size_of_every_network_has_a_flag():
    import inspect  # noqa: PLC0415

    from model import NETWORKS  # noqa: PLC0415
    from model.rdn import PUBLISHED  # noqa: PLC0415
    sizes = {key for network, _ in NETWORKS.values() for key in inspect.signature(network).parameters}
    assert sizes - set(vars(parse())) == {"in_chans"}  # images are RGB here; gray networks are only read from files
    assert {name: tuple(map(int, numbers.split(","))) for numbers, name in option_types.RDN_NAMES.items()} == PUBLISHED


def test_help_needs_no_torch():
    check = "import sys, option; option.make_parser().format_help(); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT / "code", check=False).returncode == 0


def test_every_flag_has_help_and_is_used():
    apart = "option.py", "option_types.py", "template.py"
    files = [file for file in (ROOT / "code").rglob("*.py") if file.name not in apart]
    code = "".join(file.read_text() for file in files)
    for action in option.make_parser()._actions:
        assert action.help, action.dest
        used = (f"args.{action.dest}", f'"{action.dest}"', f"{action.dest}=", f"{action.dest},", f"{action.dest})")
        in_option = action.dest in ("template", "alpha", "feature_loss_used", "feature_distilation_type", "help")
        assert in_option or any(use in code for use in used), f"--{action.dest} has no effect"


NAMES = None, option_types.parse_list, option_types.parse_once, option_types.parse_names
NUMERIC = [action.option_strings[0] for action in option.make_parser()._actions if action.type not in NAMES]
ABSURD = ["2147483648", "9223372036854775808", "1" + "0" * 30, "1" + "0" * 5000, "-1", "1e400", "-1e400", "nan", "", "x",
          "\uff11", "1_000", "[2147483648]", "2147483648-4294967296it", "1e400*zoom_in", "0.9,nan", "1,2,99999999999"]
BOUNDS = {"--seed": 2**63 - 1, "--decay": 10**18}


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: value[:20])
@pytest.mark.parametrize("flag", NUMERIC)
def test_an_absurd_number_is_refused_in_one_line_or_is_in_bounds(flag, value, capsys):
    try:
        parsed = getattr(option.make_parser().parse_args([f"{flag}={value}"]), flag[2:])
    except SystemExit as ended:
        err = capsys.readouterr().err
        assert ended.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        return
    for number in parsed if isinstance(parsed, (list, tuple)) else [parsed]:
        if isinstance(number, int):
            assert 0 <= number <= BOUNDS.get(flag, 10**9), (flag, number)
        elif isinstance(number, float):
            assert 0 <= number <= option_types.LARGEST, (flag, number)


def test_every_numeric_flag_is_tried_with_absurd_numbers():
    assert {"--patch_size", "--n_feats", "--epochs", "--test_every", "--features", "--betas", "--seed"} <= set(NUMERIC)
    assert len(NUMERIC) > 50
