"""Distributions of targets that have no name of their own, each from an output ``[N, 6]``."""

import torch
import torch.nn.functional as F

D = torch.distributions


class DirichletMultinomial(D.Distribution):
    """Counts of three kinds among ten draws, as somebody else would write it."""

    arg_constraints = {}  # noqa: RUF012
    support = D.constraints.independent(D.constraints.nonnegative_integer, 1)
    total = 10

    def __init__(self, concentration):
        self.concentration = concentration
        super().__init__(concentration.shape[:-1], concentration.shape[-1:])

    def log_prob(self, value):
        a, n = self.concentration, torch.tensor(self.total + 1.0, dtype=value.dtype)
        whole = torch.lgamma(a.sum(-1)) + torch.lgamma(n) - torch.lgamma(a.sum(-1) + self.total)
        each = torch.lgamma(value + a) - torch.lgamma(a) - torch.lgamma(value + 1)
        return whole + each.sum(-1)

    def sample(self, sample_shape=()):
        p = D.Dirichlet(self.concentration).sample(sample_shape)
        return D.Multinomial(self.total, p).sample()


def multivariate_normal(f):
    below = F.pad(f[:, 4:5, None], (0, 1, 1, 0))
    factor = F.softplus(f[:, 2:4]).diag_embed() + below
    return D.MultivariateNormal(f[:, :2], scale_tril=factor)


def mixture(f):
    parts = D.Normal(f[:, :3], F.softplus(f[:, 3:]))
    return D.MixtureSameFamily(D.Categorical(logits=f[:, 1:4]), parts)


FAMILIES = {
    "normal": lambda f: D.Normal(f[:, :3], F.softplus(f[:, 3:])),
    "independent normal": lambda f: D.Independent(D.Normal(f[:, :3], f[:, 3:].exp()), 1),
    "normal without a component": lambda f: D.Normal(f[:, 0], F.softplus(f[:, 1])),
    "normal at each position": lambda f: D.Normal(
        f.unflatten(1, (3, 2))[..., 0], f.unflatten(1, (3, 2))[..., 1].exp()
    ),
    "laplace": lambda f: D.Laplace(f[:, :3], F.softplus(f[:, 3:])),
    "student": lambda f: D.StudentT(1 + f[:, 0].exp(), f[:, 1], f[:, 2].exp()),
    "independent student": lambda f: D.Independent(D.StudentT(5.0, f[:, :3], f[:, 3:].exp()), 1),
    "negative binomial": lambda f: D.NegativeBinomial(f[:, :3].exp(), logits=f[:, 3:] / 2),
    "poisson": lambda f: D.Poisson(f.exp()),
    "mixture of counts": lambda f: D.MixtureSameFamily(
        D.Categorical(logits=f[:, :3]), D.Poisson(f[:, 3:].exp())
    ),
    "multivariate normal": multivariate_normal,
    "categorical": lambda f: D.Categorical(logits=f),
    "one-hot categorical": lambda f: D.OneHotCategorical(logits=f),
    "bernoulli": lambda f: D.Bernoulli(logits=f),
    "binomial": lambda f: D.Binomial(4, logits=f),
    "beta": lambda f: D.Beta(f[:, :3].exp(), f[:, 3:].exp()),
    "gamma": lambda f: D.Gamma(f[:, :3].exp(), f[:, 3:].exp()),
    "log-normal": lambda f: D.LogNormal(f[:, :3], f[:, 3:].exp()),
    "dirichlet": lambda f: D.Dirichlet(f.exp()),
}
"""Those whose Fisher information follows."""

WITHOUT_ROOT = {
    "mixture": mixture,
    "dirichlet-multinomial": lambda f: DirichletMultinomial(f[:, :3].exp()),
}
"""Those with samples and a density alone."""
