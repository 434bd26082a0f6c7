/// What a memory plan is computed from: the bytes of the weights, and the factors by which MLX's
/// working memory grows with each part of a step.
///
/// They are the converter's, which checks them against MLX's measured peak; a manifest holds them.
/// With L tokens a chunk, D the hidden size, I the MLP's, S positions that attention reads and e bytes
/// a number: `mlp * L * I * e`, `residual * L * D * e`, `scores * heads * L * S * e`, and where the
/// cache is quantized `quantization * L * kvHeads * headDim * 2 * e`.
public struct MemoryTerms: Sendable, Equatable {
    /// Where MLX computes.
    public enum Machine: Sendable { case gpu, cpu }

    public var weightsBytes: Int
    /// Bytes of a number that is computed with.
    public var computeBytes: Int
    public var mlp, residual, scores, scoresInBlocks, quantization: Double
    public var fixedBytes: Int

    /// The terms of a checked folder.
    public init(_ checkpoint: Checkpoint, on machine: Machine = .gpu) {
        let wide = machine == .cpu || !checkpoint.floatTypes.isSubset(of: ["BF16"])
        self.init(wide: wide, on: machine)
        weightsBytes =
            checkpoint.matrices.values.reduce(0) { $0 + $1.weightBytes(computeBytes) }
            + Self.numbers(checkpoint.config) * computeBytes
    }

    /// The terms of a model with all matrices in `format`, where it fits them; nobody has to have
    /// written it.
    init(_ config: ModelConfig, _ format: QuantizedFormat, like terms: MemoryTerms) {
        self = terms
        let bytes = Layout.matrices(config).map { matrix -> Int in
            format.fits(matrix.columns)
                ? format.weightBytes(
                    rows: matrix.rows, columns: matrix.columns, scaleBytes: computeBytes)
                : matrix.rows * matrix.columns * computeBytes
        }
        // A hostile config describes more than an Int holds.
        let all = bytes.reduce(Double(Self.numbers(config) * computeBytes)) { $0 + Double($1) }
        weightsBytes = Int(min(all, 1e18))
    }

    /// The terms that a manifest holds.
    ///
    /// - Throws: `ApertusError` that names the key.
    init(_ object: JSON, name: String) throws {
        let keys = KeyReader(object, name)
        func factor(_ key: String) throws -> Double { try keys.number(key, above: -1e-9, to: 1e3) }
        weightsBytes = try keys.integer("weights_bytes", 1 ... 1 << 50)
        computeBytes = try keys.integer("compute_bytes", 1 ... 8)
        (mlp, residual) = (try factor("mlp"), try factor("residual"))
        (scores, scoresInBlocks) = (try factor("scores"), try factor("scores_in_blocks"))
        quantization = try factor("quantization")
        fixedBytes = try keys.integer("fixed_bytes", 0 ... 1 << 40)
    }

    private init(wide: Bool, on machine: Machine) {
        weightsBytes = 0
        computeBytes = wide ? 4 : 2
        switch machine {
        case .cpu:
            (mlp, residual, scores, scoresInBlocks) = (5, 8, 1.25, 2.6)
            (quantization, fixedBytes) = (3, 1_500_000)
        case .gpu:
            (mlp, residual, scores, scoresInBlocks) = (2, 6, 0, 2.5)
            (quantization, fixedBytes) = (wide ? 6 : 12, 8_000_000)
        }
    }

    /// Of norms and xIELU.
    private static func numbers(_ config: ModelConfig) -> Int {
        Layout.vectors(config).reduce(0) { $0 + $1.shape.reduce(1, *) }
    }
}
