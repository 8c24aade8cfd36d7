"""What a run of the emoji preset does not write, because it takes a command, a detector or a setting of its own."""

BESIDE_A_PLAIN_RUN = {
    *("studies", "votes", "audits", "audit_samples", "confusion_matrices", "corrected_shares"),
    *("sampler_comparisons", "sampler_differences", "benchmarks", "latents", "seeds", "seed_summaries"),
    *("detections", "region_attributes", "target_shares", "entanglements"),
    *("image_scores", "image_features", "extensions"),
}
