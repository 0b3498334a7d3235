"""fastkd's losses in the shapes that other packages expect; a module imports its package itself.

``timm``: a task for timm's training script. ``torchdistill``: losses for its YAML. ``mdistiller``: the loss
that an mdistiller config means. ``liger``: ``KLDivLoss`` and ``JSD`` on logits. ``trl``: the GKD trainer's
loss. ``modelopt``: its loss on logits. Results are those of the package replaced, its conventions included;
docs/dropin.md tells them.
"""
