"""Presets of --template, several of which are joined by +: default values that flags on the command line override."""

TEMPLATES = {
    # FAKD (He et al., ICIP 2020), the published training command
    "FAKD": dict(alpha=0.5, feature_loss_used=1, feature_distilation_type="10*SA", features="[1,2,3]",
                 lr=1e-4, decay="150-300-450-600", gamma=0.5, epochs=200, test_every=1000, batch_size=16),
    # CSD (Wang et al., IJCAI 2021), the published training command; EDSR, RCAN or CARN as the teacher
    "CSD": dict(loss="1*DS+200*CSD+1*T_DS", width_mult=0.25, neg_num=10, d_func="L1", t_l_remove=400,
                lr=1e-4, decay="200", gamma=0.5, epochs=400, test_every=1000, batch_size=16),
    # DCKD (Zhou et al., AAAI 2025); 25.5 and 0.255 are the published 0.1 and 0.001 for images in [0, 255]
    "DCKD": dict(loss="1*DS+1*TS+1*LC+25.5*DCR+0.255*DMM", lc_p=0.5, dcr_negatives=4, dcr_noise=1, dcr_blur=0, dcr_resize=0,
                 history_every="1000-2000-3000", ema=0.999, lr=1e-4, betas="0.9,0.99", decay="100-200", gamma=0.1,
                 epochs=250, test_every=1000, batch_size=16),
    # DUKD (Zhang et al., 2023): the settings for EDSR; those for RCAN and SwinIR have one zoom_in crop and no zoom_out
    "DUKD": dict(loss="5*DS+1*TS", upcycle="1*zoom_in+1*zoom_out", n_zoom_in=2, label_consistency=0.3, ema=0.999, lr=1e-4,
                 betas="0.9,0.99", decay="100000-200000it", gamma=0.1, epochs=250, test_every=1000, batch_size=16),
    "DUKD_RCAN": dict(loss="1*DS+1*TS", upcycle="1*zoom_in", n_zoom_in=1, label_consistency=0.3, ema=0.999, lr=1e-4,
                      betas="0.9,0.99", decay="100000-200000it", gamma=0.1, epochs=250, test_every=1000, batch_size=16),
    "DUKD_SwinIR": dict(loss="5*DS+1*TS", upcycle="1*zoom_in", n_zoom_in=1, label_consistency=0.3, ema=0.999, lr=1e-4,
                        betas="0.9,0.99", decay="100000-200000it", gamma=0.1, epochs=250, test_every=1000, batch_size=16),
    # no distillation, but initialised with the teacher's weights: the baseline of students that are initialised so
    "inherit": dict(loss="1*DS", init_from_teacher=True),
    # MCADKD (Ko et al., ICCVW 2025); 12.75 and 2.55 are the published 0.05 and 0.01 for images in [0, 255]
    "MCADKD": dict(loss="3*DS+0.5*TS+12.75*NCE+2.55*GAN", nce_type="hybrid", nce_mining="hard", gan_type="GAN",
                   lr=1e-4, betas="0.9,0.99", batch_size=16),
    # sizes of published networks, with their number of parameters at scale 2; the scale itself is --scale
    "EDSR": dict(model="EDSR", n_resblocks=32, n_feats=256, res_scale=0.1),          # 40.73M, the teacher
    "EDSR_baseline": dict(model="EDSR", n_resblocks=16, n_feats=64, res_scale=1.0),  # 1.370M, FAKD's student
    "EDSR_DUKD": dict(model="EDSR", n_resblocks=32, n_feats=64, res_scale=0.1),      # 2.552M, DUKD's student
    "EDSR_CSD": dict(model="EDSR", n_resblocks=32, n_feats=64, res_scale=0.1),       # 2.552M, CSD's student
    "RCAN": dict(model="RCAN", n_resgroups=10, n_resblocks=20, n_feats=64, reduction=16),         # 15.44M, the teacher
    "RCAN_student": dict(model="RCAN", n_resgroups=10, n_resblocks=6, n_feats=64, reduction=16),  # 5.024M
    "SAN": dict(model="SAN", n_resgroups=20, n_resblocks=10, n_feats=64, reduction=16),           # 15.71M, the teacher
    "SAN_student": dict(model="SAN", n_resgroups=6, n_resblocks=10, n_feats=64, reduction=16),    # 4.848M
    "SwinIR": dict(model="SwinIR", depths="6,6,6,6,6,6", num_heads="6,6,6,6,6,6", n_feats=180, window_size=8, mlp_ratio=2,
                   upsampler="pixelshuffle"),                                        # 11.75M, the teacher (classical, M)
    "SwinIR_student": dict(model="SwinIR", depths="6,6,6,6", num_heads="6,6,6,6", n_feats=60, window_size=8, mlp_ratio=2,
                           upsampler="pixelshuffle"),                                # 1.088M, DUKD's and DCKD's student
    "SwinIR_light": dict(model="SwinIR", depths="6,6,6,6", num_heads="6,6,6,6", n_feats=60, window_size=8, mlp_ratio=2,
                         upsampler="pixelshuffledirect"),                            # 0.910M (lightweight, S)
    "CARN": dict(model="CARN", n_feats=64, group=1),                                 # 0.964M
    "CARN_multi": dict(model="CARN", n_feats=64, group=1, multi_scale="2+3+4"),      # 1.592M, the released checkpoint
    "CARN_M": dict(model="CARN_M", n_feats=64, group=4, multi_scale="2+3+4"),        # 0.415M, the released checkpoint
    "RDN_A": dict(model="RDN", G0=64, RDNkSize=3, RDNconfig="A"),                    # 5.54M
    "RDN_B": dict(model="RDN", G0=64, RDNkSize=3, RDNconfig="B"),                    # 22.12M
    "IMDN": dict(model="IMDN", n_feats=64, n_modules=6),                             # 0.694M
}
