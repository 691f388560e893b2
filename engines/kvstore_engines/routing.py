"""Which experts a token goes to, by torch; a GPU chooses by `kvstore_kernels.experts`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.config import MoeConfig


@dataclass(frozen=True)
class Router:
    """weight (experts, hidden); correction (experts,), V3 only: added for the choice alone."""

    config: MoeConfig
    weight: torch.Tensor
    correction: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen experts' weights and numbers, both (tokens, top_k), in float32 and int64.

        x (tokens, hidden); scores are float32 whatever the dtype.
        """
        c = self.config
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if self.correction is None else logits.sigmoid()
        choice = scores if self.correction is None else scores + self.correction.float()
        if c.method != "greedy":
            choice = self._keep_best_groups(choice)
        chosen = choice.topk(c.top_k, dim=-1).indices
        weight = scores.gather(1, chosen)
        if c.normalize:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return weight * c.scaling, chosen

    @property
    def ranked_by(self) -> int:
        """How many of a group's best experts rank it."""
        return 1 if self.correction is None else 2

    def _keep_best_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """Rule out experts outside the best groups."""
        grouped = torch.unflatten(choice, -1, (self.config.groups, -1))
        best = grouped.topk(self.ranked_by, dim=-1).values.sum(-1)
        kept = best.topk(self.config.top_groups, dim=-1).indices
        out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        return grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
