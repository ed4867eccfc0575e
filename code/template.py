"""Named presets, `--template NAME` or several joined by +: defaults that flags given explicitly override."""

TEMPLATES = {
    # FAKD (He et al., ICIP 2020), the published training command
    "FAKD": dict(alpha=0.5, feature_loss_used=1, feature_distilation_type="10*SA", features="[1,2,3]",
                 lr=1e-4, decay="150-300-450-600", gamma=0.5, epochs=200, test_every=1000, batch_size=16),
    # sizes of published networks (MODELS: parameters at x2)
    "EDSR": dict(model="EDSR", n_resblocks=32, n_feats=256, res_scale=0.1),           # 40.73M, the teacher
    "EDSR_baseline": dict(model="EDSR", n_resblocks=16, n_feats=64, res_scale=1.0),   # 1.37M, FAKD's student
    "RCAN": dict(model="RCAN", n_resgroups=10, n_resblocks=20, n_feats=64, reduction=16),         # 15.44M, the teacher
    "RCAN_student": dict(model="RCAN", n_resgroups=10, n_resblocks=6, n_feats=64, reduction=16),  # 5.02M, FAKD's student
}
