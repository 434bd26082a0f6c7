"""The model without a GPU: onnxruntime's quantized kernels, the same model behind them.

MLX's own CPU backend is made for correctness: one thread, scalar loops. Here the arithmetic between
two attentions runs as one onnxruntime graph per layer (`stage`, `runtime`), on MLX's own quantized
weights (`weights`), with keys and values in memory that attention reads and writes in place
(`cache`, `attention`). `model.CPUModel` answers to the same names as
`apertus_mlx.model.apertus.Model`.
"""

from apertus_mlx.system import telemetry

telemetry.turn_off()
