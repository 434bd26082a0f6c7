// swift-tools-version: 6.0
// Signatures of mlx-swift-lm and of MLXNN, without bodies, so that ApertusMLXLM is type-checked where
// neither can be fetched. It is no product and never runs. It shows misspelt names and wrong types in
// ours; what upstream changes it does not show: that the macOS job of the hosted workflow does.
import PackageDescription

let package = Package(
    name: "mlx-swift-lm",
    products: [
        .library(name: "MLXLLM", targets: ["MLXLLM"]),
        .library(name: "MLXLMCommon", targets: ["MLXLMCommon"]),
    ],
    dependencies: [.package(path: "../../../../Linux/mlx-swift")],
    targets: [
        .target(name: "MLXNN", dependencies: [.product(name: "MLX", package: "mlx-swift")]),
        .target(name: "MLXLMCommon", dependencies: ["MLXNN"]),
        .target(name: "MLXLLM", dependencies: ["MLXLMCommon"]),
    ]
)
