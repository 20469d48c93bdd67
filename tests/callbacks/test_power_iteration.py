import torch
from torch import nn

from llmfoundry_wesar import functional
from llmfoundry_wesar.callbacks import PowerIteration
from llmfoundry_wesar.layers import SigmaReparamLinear
from tests.callbacks.training import BATCH, VOCABULARY, WIDTH, regression, train


def test_a_training_step_makes_one_power_iteration():
    """Two steps of two microbatches each. The learning rate is 0, so that W stays."""
    model = regression(lambda: nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), SigmaReparamLinear(WIDTH, 3)))
    layer = model.net[1]
    left, right = layer.left.clone(), layer.right.clone()
    for _ in range(2):
        left, right = functional.power_iteration(layer.weight, left, right)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, [PowerIteration()], 2, device_train_microbatch_size=BATCH // 2)
    assert torch.equal(layer.left, left) and torch.equal(layer.right, right)
