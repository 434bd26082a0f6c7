import MLX

/// Up to so many query rows a key head, codes are multiplied as they are.
private let maxRowsOnCodes = 16
/// Positions that are dequantized at a time when more queries come.
private let block = 512
/// Bytes of scores that are computed at a time; more queries come in several blocks.
private let maxScoresBytes = 1 << 23

/// Scaled dot-product attention of `queries` `[B, heads, L, headDim]`; the same shape.
///
/// Scores of all parts meet in one softmax, so the result is that of attention over the dequantized
/// whole. Nothing but a block of it is ever dequantized at a time.
func attend(
    _ queries: MLXArray, _ cached: CachedRows, scale: Float,
    mask: MLXFast.ScaledDotProductAttentionMaskMode
) -> MLXArray {
    switch cached {
    case .whole(let keys, let values):
        return MLXFast.scaledDotProductAttention(
            queries: queries, keys: keys, values: values, scale: scale, mask: mask)
    case .parts(let keys, let values, let rotated):
        let queries = rotated ? hadamardTransform(queries) : queries
        if keys.count == 1, values.count == 1, case .rows(let keys) = keys[0],
            case .rows(let values) = values[0]
        {
            return MLXFast.scaledDotProductAttention(
                queries: queries, keys: keys, values: values, scale: scale, mask: mask)
        }
        return attend(queries, keys, values, scale: scale, mask: mask)
    }
}

private func attend(
    _ queries: MLXArray, _ keys: [CachePart], _ values: [CachePart], scale: Float,
    mask: MLXFast.ScaledDotProductAttentionMaskMode
) -> MLXArray {
    let (heads, length) = (queries.dim(1), queries.dim(2))
    let positions = keys.reduce(0) { $0 + $1.length }
    let step = max(1, maxScoresBytes / (queries.dim(0) * heads * positions * 4))
    let array: MLXArray? =
        switch mask {
        case .none: nil
        case .array(let array): array
        default:
            maskArray(queries: positions - length ..< positions, keys: Array(0 ..< positions)) {
                $1 <= $0
            }
        }
    if length <= step { return attendBlock(queries, keys, values, scale: scale, mask: array) }
    return concatenated(
        stride(from: 0, to: length, by: step).map { start in
            let rows = start ..< min(start + step, length)
            let output = attendBlock(
                queries[.ellipsis, rows, 0...], keys, values, scale: scale,
                mask: array.map { $0[rows] })
            // One block after the other, or all their scores would be there at the same time.
            eval(output)
            return output
        }, axis: 2)
}

private func attendBlock(
    _ queries: MLXArray, _ keys: [CachePart], _ values: [CachePart], scale: Float, mask: MLXArray?
) -> MLXArray {
    let (batch, heads, length, headDim) = (
        queries.dim(0), queries.dim(1), queries.dim(2), queries.dim(3)
    )
    let keyHeads = switch keys[0] {
    case .rows(let rows): rows.dim(1)
    case .codes(let codes): codes.words.dim(1)
    }
    // Query heads that share a key head stand below each other: one product for all of them.
    let rows = (queries * scale).reshaped([batch, keyHeads, -1, headDim])
    var all = concatenated(keys.map { scores(rows, $0) }, axis: -1)
    if let mask {
        let apart = all.reshaped([batch, heads, length, -1])
        all = which(mask, apart, lowest(all.dtype)).reshaped(all.shape)
    }
    let weights = softmax(all, axis: -1, precise: true)
    var (output, start): (MLXArray?, Int) = (nil, 0)
    for part in values {
        let stop = start + part.length
        let product = weighted(weights[.ellipsis, start ..< stop], part)
        output = output.map { $0 + product } ?? product
        start = stop
    }
    return output!.reshaped([batch, heads, length, headDim])
}

private func scores(_ rows: MLXArray, _ keys: CachePart) -> MLXArray {
    switch keys {
    case .rows(let keys):
        return matmul(rows, keys.transposed(0, 1, 3, 2))
    case .codes(let codes) where rows.dim(2) <= maxRowsOnCodes:
        return codes.product(rows, transpose: true)
    case .codes(let codes):
        let blocks = ranges(keys.length).map { range in
            matmul(rows, codes.dequantize(range, rows.dtype).transposed(0, 1, 3, 2))
        }
        return blocks.count == 1 ? blocks[0] : concatenated(blocks, axis: -1)
    }
}

private func weighted(_ weights: MLXArray, _ values: CachePart) -> MLXArray {
    switch values {
    case .rows(let values):
        return matmul(weights, values)
    case .codes(let codes) where weights.dim(2) <= maxRowsOnCodes:
        return codes.product(weights, transpose: false)
    case .codes(let codes):
        return ranges(values.length).map { range in
            matmul(weights[.ellipsis, range], codes.dequantize(range, weights.dtype))
        }.reduce(nil) { sum, product in sum.map { $0 + product } ?? product }!
    }
}

/// `0 ..< length` in blocks.
private func ranges(_ length: Int) -> [Range<Int>] {
    stride(from: 0, to: length, by: block).map { $0 ..< min($0 + block, length) }
}

/// The least finite number of a floating-point type.
private func lowest(_ type: DType) -> Float {
    switch type {
    case .bfloat16: Float(bitPattern: 0xFF7F_0000)
    case .float16: -65504
    default: -Float.greatestFiniteMagnitude
    }
}
