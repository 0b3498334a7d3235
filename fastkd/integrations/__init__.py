"""fastkd's losses with the interfaces of other packages; each module imports its package itself.

``timm``: a task for timm's training script. ``torchdistill``: losses for its YAML. ``mdistiller``: the loss
that an mdistiller config means. ``liger``: ``KLDivLoss`` and ``JSD`` on logits. ``trl``: the GKD trainer's
loss. ``modelopt``: its loss on logits. Results are those of the replaced package, including its conventions:
see docs/dropin.md.
"""
