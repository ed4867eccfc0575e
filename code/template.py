"""Presets of --template, several of which are joined by +: default values that flags on the command line override."""
from published import training_preset

TEMPLATES = {
    # training settings of published experiments (published.csv), for any student, scale and test
    "FAKD": training_preset("FAKD/RCAN/x4"),        # He et al., ICIP 2020
    "CSD": training_preset("CSD/EDSR/x4/0.25"),     # Wang et al., IJCAI 2021
    "DCKD": training_preset("DCKD/SwinIR/x4"),      # Zhou et al., AAAI 2025
    "DUKD": training_preset("DUKD/EDSR/x2"),        # Zhang et al., 2023; at scales 3 and 4 one zoom_in crop instead of two
    "DUKD_RCAN": training_preset("DUKD/RCAN/x4"),   # the same at scale 2; at 3 with zoom_out and label consistency
    "DUKD_SwinIR": training_preset("DUKD/SwinIR/x4"),
    "MCADKD": training_preset("MCADKD/SwinIR/x2"),  # Ko et al., ICCVW 2025; for EDSR with another learning rate, no EMA
    # the recipe of figure/README.md ("Methods"): cheap supervision by the teacher and a fast optimiser, for a teacher that
    # runs in every iteration and for one whose outputs are cached
    "best_running": dict(loss="1*DS+1*TS", optimizer="MUON", lr="5e-3", decay="cosine", warmup="50"),
    "best": dict(loss="1*DS+1*TS", optimizer="MUON", lr="5e-3", decay="cosine", warmup="50", cache_teacher=True),
    # Real-ESRGAN's training (Wang et al., ICCVW 2021; train_realesrnet_x4plus.yml, then train_realesrgan_x4plus.yml with the
    # result of the first as --pre_train), and a teacher as an addition, for any student: RealESRNet_student+Compact_L. VGG
    # has the layers of CSD, and the discriminator's real images are sharpened too
    "RealESRNet_student": dict(degrade="realesrgan", loss="1*DS+1*TS", image_range="1", optimizer="ADAM", lr="2e-4",
                               betas="0.9,0.99", gamma="1", ema="0.999", batch_size="48", patch_size="256", epochs="1000",
                               test_every="1000"),
    "RealESRGAN_student": dict(degrade="realesrgan", loss="1*DS+1*TS+1*VGG+0.1*GAN", image_range="1", gan_net="unet",
                               gan_lr="1e-4", optimizer="ADAM", lr="1e-4", betas="0.9,0.99", gamma="1", ema="0.999",
                               batch_size="48", patch_size="256", epochs="400", test_every="1000"),
    # no distillation, but initialised with the teacher's weights: the baseline of students that are initialised so
    "inherit": dict(loss="1*DS", init_from_teacher="first"),
    # sizes of published networks, with their number of parameters at scale 2; the scale itself is --scale
    "EDSR": dict(model="EDSR", n_resblocks=32, n_feats=256, res_scale=0.1),          # 40.73M, the teacher
    "EDSR_baseline": dict(model="EDSR", n_resblocks=16, n_feats=64, res_scale=1.0),  # 1.370M, FAKD's student
    "EDSR_DUKD": dict(model="EDSR", n_resblocks=32, n_feats=64, res_scale=0.1),      # 2.552M, DUKD's and MCADKD's student
    "EDSR_CSD": dict(model="EDSR", n_resblocks=32, n_feats=64, res_scale=0.1),       # 2.552M, CSD's student
    "RCAN": dict(model="RCAN", n_resgroups=10, n_resblocks=20, n_feats=64, reduction=16),         # 15.44M, the teacher
    "RCAN_student": dict(model="RCAN", n_resgroups=10, n_resblocks=6, n_feats=64, reduction=16),  # 5.024M
    "SAN": dict(model="SAN", n_resgroups=20, n_resblocks=10, n_feats=64, reduction=16),           # 15.71M, the teacher
    "SAN_student": dict(model="SAN", n_resgroups=6, n_resblocks=10, n_feats=64, reduction=16),    # 4.848M
    "SwinIR": dict(model="SwinIR", depths="6,6,6,6,6,6", num_heads="6,6,6,6,6,6", n_feats=180, window_size=8,
                   mlp_ratio=2),                                                     # 11.75M, the teacher (classical, M)
    "SwinIR_student": dict(model="SwinIR", depths="6,6,6,6", num_heads="6,6,6,6", n_feats=60, window_size=8,
                           mlp_ratio=2),                                             # 1.088M, DUKD's and DCKD's student
    "SwinIR_light": dict(model="SwinIR", depths="6,6,6,6", num_heads="6,6,6,6", n_feats=60, window_size=8, mlp_ratio=2,
                         upsampler="pixelshuffledirect"),                            # 0.910M (lightweight, S)
    "CARN": dict(model="CARN", n_feats=64, group=1),                                 # 0.964M
    "CARN_multi": dict(model="CARN", n_feats=64, group=1, multi_scale="2+3+4"),      # 1.592M, the released checkpoint
    "CARN_M": dict(model="CARN_M", n_feats=64, group=4, multi_scale="2+3+4"),        # 0.415M, the released checkpoint
    "RDN_A": dict(model="RDN", G0=64, RDNkSize=3, RDNconfig="A"),                    # 5.54M
    "RDN_B": dict(model="RDN", G0=64, RDNkSize=3, RDNconfig="B"),                    # 22.12M
    "IMDN": dict(model="IMDN", n_feats=64, n_modules=6),                             # 0.694M
    "SPAN": dict(model="SPAN", n_feats=52),                                          # 0.481M, fused
    "SPAN_S": dict(model="SPAN", n_feats=48),                                        # 0.411M, fused
    "SPAN_student": dict(model="SPAN", n_feats=28),                                  # 0.142M, fused
    "RRDB": dict(model="RRDB", n_feats=64, num_block=23, num_grow_ch=32),             # 16.70M, ESRGAN, Real-ESRGAN
    "RRDB_6B": dict(model="RRDB", n_feats=64, num_block=6, num_grow_ch=32),           # 4.468M at scale 4, Real-ESRGAN anime
    # of networks for scale 1
    "NAFNet": dict(model="NAFNet", n_feats=32, enc_blk_nums="1,1,1,28", middle_blk_num=1,
                   dec_blk_nums="1,1,1,1"),                                          # 17.11M, the teacher (GoPro)
    "NAFNet_student": dict(model="NAFNet", n_feats=16, enc_blk_nums="1,1,1,14", middle_blk_num=1,
                           dec_blk_nums="1,1,1,1"),                                  # 2.683M, of DCKD: see published.csv
    "Restormer": dict(model="Restormer", n_feats=48, num_blocks="4,6,6,8", num_refinement_blocks=4,
                      heads="1,2,4,8", ffn_expansion_factor=2.66),                   # 26.13M, the teacher
    "Restormer_student": dict(model="Restormer", n_feats=24, num_blocks="2,3,3,4", num_refinement_blocks=2,
                              heads="1,2,4,8", ffn_expansion_factor=2.66),           # 3.813M, of DCKD: see published.csv
    "NAFNet_S": dict(model="NAFNet", n_feats=16, enc_blk_nums="1,1,2", middle_blk_num=1,
                     dec_blk_nums="1,1,1"),                                          # 0.319M, no published size
    # no published sizes: each takes twice the time of the one before it (figure/README.md)
    "Compact_S": dict(model="Compact", n_feats=32, n_convs=4, act_type="prelu"),     # 0.042M
    "Compact_M": dict(model="Compact", n_feats=32, n_convs=9, act_type="prelu"),     # 0.088M
    "Compact_L": dict(model="Compact", n_feats=48, n_convs=9, act_type="prelu"),     # 0.194M
}
