"""Flags in files, the nearest flag, names of test sets, --resume auto."""
import pytest

import option
from config import to_text

ALL_FLAGS = (  # one value that is no default, of each flag
    "--cpu --gpu_id 1 --n_GPUs 2 --n_threads 3 --precision bf16 --teacher_precision half --feature_precision "
    "bf16 --compile --seed 5 --dir_data d/a+b --data_train "
    "[A,B] --data_test Set5+Demo --dir_demo d --data_range 1-8/9-10 --ext img --dir_cache c --scale 2 --patch_size 64 "
    "--pair_dirs a/b+c/d "
    "--no_augment --rgb_range 1 --model SwinIR --teacher [RCAN,x.pt] --n_resgroups 2 --n_resblocks 3 --n_feats 8 "
    "--reduction 4 --res_scale 0.1 --n_inner 2 --n_modules 3 --n_convs 2 "
    "--act_type relu --reparameterise ECB --G0 4 --RDNkSize 3 --RDNconfig 4,3,16 --group 2 "
    "--multi_scale 2+3 --carn_variant CSD --depths [2,2] --num_heads 2,2 --window_size 4 --mlp_ratio 1.5 "
    "--upsampler nearest+conv --teacher_choice mean --enc_blk_nums 1,2 --middle_blk_num 2 --dec_blk_nums 2,1 --tlc_size 384 "
    "--num_blocks 1,2,2,1 --num_refinement_blocks 2 --heads 1,1,2,2 --ffn_expansion_factor 2 --LayerNorm_type BiasFree "
    "--num_block 2 --num_grow_ch 8 "
    "--resi_connection 3conv --img_range 2 --width_mult 0.5 --init_from_teacher --pre_train p.pt --lora_rank 2 --loss "
    "1e-05*DS+1*GAN@0-50%,1*DS@50-100% --features 0,3 --pool_size 2 --pool_type avg --P 3 --rbf_gamma 2 "
    "--upcycle 0.5*zoom_in+1e-07*zoom_out --upcycle_every 3 --n_zoom_in 2 --view_terms DS+GAN --label_consistency 0.3 "
    "--label_consistency_views original+zoom_in --zoom_in_tiles batch --feature_net random "
    "--vgg_path v --vqgan_path q --d_func cos --neg_num 2 --t_l_remove 3 --lc_p 0.1 --dcr_negatives 0 --dcr_noise 0.1 "
    "--dcr_blur 0.2 --dcr_resize 0.3 --history_every 5-6 --nce_type patch --nce_mining all --nce_denominator standard "
    "--nce_patches 3 --nce_patch_size 32 --gan_type WGAN --gan_net unet --gan_k 2 --gan_lr 1e-3 --epochs 3 --test_every 4 "
    "--batch_size 8 --split_batch 2 --optimizer SGD --lr 3e-05 --decay cosine --lr_end 1e-7 --warmup 2 --gamma 0.1 "
    "--momentum 0.5 --betas 0.5,0.9 --epsilon 1e-9 --weight_decay 1e-6 --gclip 3 --grad_norm 2 --ema 0.9 --print_every 7 "
    "--decay_from 3 --log_gradients 3 --gan_update before "
    "--ckp_dir x/y --save_every 2 --tensorboard --save_models --save_results --save_gt --ckp_path z.pt --TS T "
    "--chop --chop_mem 1 --metric_space rgb --shave 3 --metrics lpips+niqe "
    "--self_ensemble --html --html_images 3 --image i --point 3,4 --crop 32 --output_size 640x360 --time "
    "--format onnx --output o.onnx --int8 f --license MIT")
NOT_WITH_LOSS = {"alpha", "feature_loss_used", "feature_distilation_type"}


def written(args, folder):
    (folder / "config.txt").write_text(to_text(args, option.make_parser()._actions), errors="surrogateescape")
    return f"@{folder / 'config.txt'}"


def test_the_list_above_has_all_flags():
    parser = option.make_parser()
    defaults, args = parser.parse_args([]), parser.parse_args(ALL_FLAGS.split())
    same = {name for name, value in vars(args).items() if value == getattr(defaults, name)}
    assert same == NOT_WITH_LOSS | {"template", "published", "resume", "reset", "cache_teacher", "eco", "degrade", "budget",
                                    "progressive"}


@pytest.mark.parametrize("line", [
    "", "--cache_teacher", "--cache_teacher self_ensemble", "--eco --decay 5-7it", "--degrade blur+noise0-5.5", ALL_FLAGS,
    "--published DUKD/RCAN/x3 --rgb_range 1",
    "--template FAKD+RCAN_student --lr 1", "--template DUKD --upcycle 1*zoom_out", "--template CSD --cpu",
    "--alpha 0.25 --feature_loss_used 1 --feature_distilation_type 2*CA", "--template DCKD --decay cosine",
    "--template CARN_multi --history_every 7 --decay 5-6", "--feature_loss_used 0 --pre_train a.pt",
    "--progressive 48/8@0,64/4@50% --scale 2", "--template DUKD --upcycle= --loss 1*DS", "--template SwinIR --dir_cache= "])
def test_a_runs_config_is_a_file_of_flags_that_repeats_it(line, tmp_path):
    args = option.parse(line.split())
    again = option.parse([written(args, tmp_path)])
    assert vars(again) == vars(args)
    assert to_text(again, option.make_parser()._actions) == to_text(args, option.make_parser()._actions)


@pytest.mark.parametrize("folder", ["a b", "a=b", "-x", "#x", "ü", "\udcff", "a'\"b", "@x", "a\u2028b", "=x", "a  b"])
def test_odd_paths_survive_the_file(folder, tmp_path):
    args = option.parse([f"--ckp_dir={folder}", f"--teacher={folder}"])
    assert vars(option.parse([written(args, tmp_path)])) == vars(args)


@pytest.mark.parametrize("folder", ["a\nb", "a\rb", " a", "a --cpu"])
def test_a_path_that_a_line_cannot_hold_is_a_comment(folder, tmp_path):
    args = option.parse([f"--ckp_dir={folder}"])
    assert option.parse([written(args, tmp_path)]).ckp_dir == "first_try"
    assert f"--ckp_dir {folder!a}: this value cannot be written" in (tmp_path / "config.txt").read_text()


def test_flags_after_a_file_override_it_and_comments_and_both_forms_are_read(tmp_path):
    (tmp_path / "run.txt").write_bytes(b"\xef\xbb\xbf# mine\r\n\r\n--lr 3e-4\r\n  --epochs=7 \r\n--cpu\r\n")
    args = option.parse([f"@{tmp_path / 'run.txt'}", "--epochs", "8"])
    assert (args.lr, args.epochs, args.cpu, args.given) == (3e-4, 8, True, {"lr", "epochs", "cpu"})


@pytest.mark.parametrize("text, words", [
    ("epochs 3", "line 1: 'epochs 3' is not of the form --flag"), ("--lr 1\n--epochs 3 --cpu", "line 2"), ("-x", "line 1"),
    ("--epoch 3", "--epochs"), ("--lr much", "much"), ("@other", "line 1"), ("--cpu yes", "--cpu"),
    ("--lr __import__('os')", "finite number"), ("\x00", "line 1"), ("--ckp_dir \x00", "line 1")])
def test_a_wrong_file_of_flags_gets_one_line(text, words, tmp_path, capsys):
    (tmp_path / "run.txt").write_text(text)
    with pytest.raises(SystemExit) as ended:
        option.parse([f"@{tmp_path / 'run.txt'}"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("name", ["missing.txt", "", "x" * 300])
def test_a_file_of_flags_that_cannot_be_read_gets_one_line(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        option.parse([f"@{tmp_path / name}"])
    err = capsys.readouterr().err
    assert err.startswith(f"error: @{tmp_path}") and "cannot read" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag, near", [("--epoch", "--epochs"), ("--batchsize=3", "--batch_size"),
                                        ("--data-test", "--data_test"), ("--learning_rate", None)])
def test_a_mistyped_flag_gets_the_nearest(flag, near, capsys):
    with pytest.raises(SystemExit):
        option.parse([flag])
    err = capsys.readouterr().err
    assert err.endswith(f"; did you mean {near}?\n" if near else f"unrecognized arguments: {flag}\n")


@pytest.mark.parametrize("name, right", [("benchmark/Set5", "Set5"), ("Set5/", "Set5"), ("../x", "x"),
                                         ("/data/Set5", "Set5"), ("..", "Set5"), (".", "Set5"), ("Set14+a/B", "B")])
def test_a_test_set_is_the_name_of_a_folder(name, right, capsys):
    with pytest.raises(SystemExit):
        option.parse(["--data_test", name])
    err = capsys.readouterr().err
    assert "name of a folder" in err and err.endswith(f"such as {right}\n") and err.count("\n") == 1


def test_resume_takes_three_words(capsys):
    assert [option.parse(["--resume", word]).resume for word in ("0", "1", "auto")] == [0, 1, "auto"]
    with pytest.raises(SystemExit):
        option.parse(["--resume", "2"])
    assert "--resume: invalid choice: '2'" in capsys.readouterr().err
