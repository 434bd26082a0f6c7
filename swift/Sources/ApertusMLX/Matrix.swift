import ApertusCore
import MLX

/// A weight matrix `[out, in]`, quantized or not.
struct Matrix {
    struct Codes {
        let scales: MLXArray
        let biases: MLXArray?
        let format: QuantizedFormat
    }
    let weight: MLXArray
    let codes: Codes?
    /// What the product is multiplied by, in float32: one number, or one for each output.
    let factor: MLXArray?

    /// The product of `x` `[..., in]` with the matrix, `[..., out]`, in the type of `x`.
    func times(_ x: MLXArray) -> MLXArray {
        let product = plainProduct(x)
        guard let factor else { return product }
        return (product * factor).asType(x.dtype)
    }

    private func plainProduct(_ x: MLXArray) -> MLXArray {
        guard let codes else { return matmul(x, weight.T) }
        return quantizedMM(
            x, weight, scales: codes.scales, biases: codes.biases, transpose: true,
            groupSize: codes.format.groupSize, bits: codes.format.bits, mode: codes.format.mlxMode)
    }

    /// One matrix whose outputs are those of `parts` one after the other; nil where formats differ.
    ///
    /// Each output has its own row of weights, so the numbers stay the same.
    static func joined(_ parts: [Matrix]) -> Matrix? {
        let formats = parts.map { $0.codes?.format }
        guard parts.allSatisfy({ $0.factor == nil && $0.codes?.format == formats[0] }) else {
            return nil
        }
        let weight = concatenated(parts.map(\.weight))
        let codes = formats[0].map { format in
            Codes(
                scales: concatenated(parts.map { $0.codes!.scales }),
                biases: format.hasBiases ? concatenated(parts.map { $0.codes!.biases! }) : nil,
                format: format)
        }
        let joined = Matrix(weight: weight, codes: codes, factor: nil)
        eval(joined.arrays)
        return joined
    }

    var arrays: [MLXArray] {
        [weight, codes?.scales, codes?.biases, factor].compactMap { $0 }
    }
}

/// The embedding: rows of a matrix by token id.
struct EmbeddingTable {
    let matrix: Matrix
    private let looksUpByProduct: Bool

    init(_ matrix: Matrix) {
        self.matrix = matrix
        looksUpByProduct = Self.productIsExact(matrix)
    }

    /// Rows `[..., in]` of the token ids `ids`.
    func callAsFunction(_ ids: MLXArray) -> MLXArray {
        looksUpByProduct && ids.size == 1
            ? Self.rowByProduct(matrix, ids) : Self.rows(matrix, ids)
    }

    private static func rows(_ matrix: Matrix, _ ids: MLXArray) -> MLXArray {
        let rows = matrix.weight.take(ids, axis: 0)
        guard let codes = matrix.codes else { return rows }
        return dequantized(
            rows, scales: codes.scales.take(ids, axis: 0),
            biases: codes.biases?.take(ids, axis: 0), groupSize: codes.format.groupSize,
            bits: codes.format.bits, mode: codes.format.mlxMode)
    }

    /// The row of a single token as a product of 1 with a matrix of that one row: one kernel where
    /// gathering its parts takes four.
    private static func rowByProduct(_ matrix: Matrix, _ ids: MLXArray) -> MLXArray {
        let codes = matrix.codes!
        func apart(_ a: MLXArray) -> MLXArray { a.reshaped([a.dim(0), 1, a.dim(1)]) }
        let product = gatherQuantizedMM(
            MLXArray([Float(1)], [1, 1]).asType(codes.scales.dtype), apart(matrix.weight),
            scales: apart(codes.scales), biases: apart(codes.biases!),
            lhsIndices: MLXArray([0] as [UInt32]), rhsIndices: ids.reshaped([1]),
            transpose: false, groupSize: codes.format.groupSize, bits: codes.format.bits)
        return product.reshaped(ids.shape + [product.dim(-1)])
    }

    /// MLX's kernel for that product is made for larger matrices: whether it has given the rows of
    /// some tokens as they are.
    private static func productIsExact(_ matrix: Matrix) -> Bool {
        guard let codes = matrix.codes, codes.format.mode == .affine else { return false }
        let last = matrix.weight.dim(0) - 1
        return [0, last / 2, last].allSatisfy { token in
            let id = MLXArray([UInt32(token)])
            let expected = rows(matrix, id).asType(.float32).asArray(Float.self)
            let found = rowByProduct(matrix, id).asType(.float32).asArray(Float.self)
            // The product is rounded once, the embedding's own row may be twice.
            let largest = expected.reduce(0) { max($0, abs($1)) }
            let margin = unitRoundoff(codes.scales.dtype) * largest
            return zip(found, expected).allSatisfy { abs($0 - $1) <= margin }
        }
    }
}

/// The distance from 1 to the next number of a floating-point type.
private func unitRoundoff(_ type: DType) -> Float {
    switch type {
    case .bfloat16: 0x1p-7
    case .float16: 0x1p-10
    default: Float.ulpOfOne
    }
}
