"""Callbacks for Composer's trainer."""

from llmfoundry_wesar.callbacks.gate_monitor import GateMonitor
from llmfoundry_wesar.callbacks.optimizer_gates import OptimizerGates
from llmfoundry_wesar.callbacks.power_iteration import PowerIteration
from llmfoundry_wesar.callbacks.spike_recorder import SpikeRecorder
from llmfoundry_wesar.callbacks.update_ratio_monitor import UpdateRatioMonitor

__all__ = ["GateMonitor", "OptimizerGates", "PowerIteration", "SpikeRecorder", "UpdateRatioMonitor"]
