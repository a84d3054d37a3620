"""The methods as plain optimizer classes, for use without a plan: ``memadvise.optim.SlimAdam(params, lr=1e-3)``."""
