"""AdamW for bf16 weights: updates are added up in fp32, on the GPU or on the CPU."""
import math

import torch

from appendix import ranks


class AdamW:
    """torch's AdamW on masters: an fp32 copy of each parameter that is not fp32 itself.

    A bf16 weight near 1 cannot move by less than 0.4 %, so an RL step of 1e-6 would be rounded away
    every time. The master adds up the steps, and the bf16 weight is the master, rounded.
    Gradients are summed in fp32 too, over micro-batches and ranks.

    offload: masters and moments (12 bytes per parameter) live on the CPU, which does the update.
    Once per step the gradients go down and the weights come up, as in ZeRO-Offload (2101.06840).

    scale: a function master -> factor on the learning rate of that parameter; None: 1 for all.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), weight_decay=0.01, scale=None,
                 offload=False):
        self.params = list(params)
        self.masters = [self.make_master(p, offload) for p in self.params]
        for p in self.params:
            p.grad_dtype = torch.float32 if p.dtype == torch.bfloat16 else p.dtype
        if scale:
            groups = [{"params": [m], "scale": scale(m)} for m in self.masters]
        else:
            groups = [{"params": self.masters, "scale": 1.0}]
        self.opt = torch.optim.AdamW(
            groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def make_master(self, p, offload):
        """The fp32 tensor that is updated for p: p itself where that is possible."""
        if p.dtype == torch.float32 and not offload:
            return p
        device = "cpu" if offload else p.device
        return p.detach().to(device).float().clone()

    def step(self, lr, clip=1.0):
        """Add up the ranks' gradients, clip their global norm, update, clear them.

        lr: learning rate; clip: largest norm. -> the norm before clipping. A gradient that is not
        finite is not applied; the caller sees that from the norm.
        """
        ranks.all_reduce_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip).item()
        for group in self.opt.param_groups:
            group["lr"] = lr * group["scale"]
        if math.isfinite(norm):
            self.update()
        for p in self.params + self.masters:
            p.grad = None
        return norm

    def update(self):
        """Copy the gradients to the masters, update these, copy the new values to the weights."""
        for p, m in zip(self.params, self.masters):
            m.grad = None if p.grad is None else p.grad.to(m.device)
        self.opt.step()
        with torch.no_grad():
            for p, m in zip(self.params, self.masters):
                if m is not p:
                    p.copy_(m)

    def tensors(self):
        """The state as one flat dict of tensors, since safetensors holds no objects.

        Keys: "3.master", "3.exp_avg", ... for parameter number 3.
        """
        out = {}
        for i, m in enumerate(self.masters):
            if m is not self.params[i]:
                out[f"{i}.master"] = m
        for i, m in enumerate(self.masters):
            for key, value in self.opt.state[m].items():
                out[f"{i}.{key}"] = value
        return out

    def load_tensors(self, state):
        """Restore what `tensors` returned."""
        for name, value in state.items():
            i, key = name.split(".")
            m = self.masters[int(i)]
            if key == "master":
                m.data.copy_(value)
            else:                                       # for the fused update "step" moves, too
                self.opt.state[m][key] = value.to(m.device)
