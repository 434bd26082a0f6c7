import MLX

/// Vectors `[B, kvHeads, S, headDim]` in MLX's affine format: `scale * code + bias`.
///
/// `words` are the packed codes, `scales` and `biases` have one entry per group of `groupSize`
/// along headDim, in a 16-bit type.
struct CacheCodes {
    let words, scales, biases: MLXArray
    let bits, groupSize: Int

    /// The vectors themselves, of positions `range`.
    func dequantize(_ range: Range<Int>, _ type: DType) -> MLXArray {
        func some(_ array: MLXArray) -> MLXArray { array[.ellipsis, range, 0...] }
        return dequantized(
            some(words), scales: some(scales).asType(type), biases: some(biases).asType(type),
            groupSize: groupSize, bits: bits)
    }

    /// `x` times the matrices of the codes, which are used as they are.
    func product(_ x: MLXArray, transpose: Bool) -> MLXArray {
        quantizedMM(
            x, words, scales: scales.asType(x.dtype), biases: biases.asType(x.dtype),
            transpose: transpose, groupSize: groupSize, bits: bits)
    }

    /// Quantize `x` `[B, heads, S, headDim]` along its last axis, with a search for the range that
    /// has the smallest squared error.
    ///
    /// Scales and biases are stored in the type of `x` where that has 16 bits, else as bfloat16.
    init(quantizing x: MLXArray, bits: Int, groupSize: Int) {
        let stored: DType = x.dtype == .float32 ? .bfloat16 : x.dtype
        let shape = x.shape
        let groups = x.asType(.float32).reshaped(shape.dropLast() + [-1, groupSize])
        let low = groups.min(axis: -1, keepDims: true)
        let high = groups.max(axis: -1, keepDims: true)
        let top = Float((1 << bits) - 1)
        var best: [MLXArray] = []
        // How much of a group's range the codes may leave out at either end.
        for shrink in bits < 8 ? [0, 0.03, 0.06, 0.1, 0.14, 0.18] : [0] {
            let margin = (high - low) * Float(shrink / 2)
            let scale = ((high - low - Float(2) * margin) / top).asType(stored)
            let bias = (low + margin).asType(stored)
            let wide = scale.asType(.float32)
            let step = which(wide .== Float(0), Float(1), wide)
            let offset = bias.asType(.float32)
            let codes = clip(round((groups - offset) / step), min: Float(0), max: top)
            let error = square(codes * wide + offset - groups).sum(axis: -1, keepDims: true)
            let found = [error, codes, scale, bias]
            if best.isEmpty {
                best = found
            } else {
                let better = error .< best[0]
                best = zip(found, best).map { which(better, $0, $1) }
            }
        }
        words = pack(best[1].reshaped(shape).asType(.uint32), bits: bits)
        func flat(_ array: MLXArray) -> MLXArray { array.reshaped(Array(array.shape.dropLast())) }
        (scales, biases) = (flat(best[2]), flat(best[3]))
        (self.bits, self.groupSize) = (bits, groupSize)
    }

    init(words: MLXArray, scales: MLXArray, biases: MLXArray, bits: Int, groupSize: Int) {
        (self.words, self.scales, self.biases) = (words, scales, biases)
        (self.bits, self.groupSize) = (bits, groupSize)
    }
}

/// Pack codes below `2^bits` along the last axis: a little-endian stream of 32-bit words.
private func pack(_ codes: MLXArray, bits: Int) -> MLXArray {
    let leading = Array(codes.shape.dropLast())
    if 32 % bits == 0 {
        let shifts = MLXArray(stride(from: 0, to: 32, by: bits).map { UInt32($0) })
        let parted = codes.reshaped(leading + [-1, 32 / bits])
        return (parted << shifts).sum(axis: -1).asType(.uint32)
    }
    // 32 codes are exactly `bits` words; a code may lie across two of them.
    let parted = codes.reshaped(leading + [-1, 1, 32])
    let firstBits = (0 ..< bits).flatMap { word in (0 ..< 32).map { $0 * bits - word * 32 } }
    func table<T: HasDType>(_ value: (Int) -> T) -> MLXArray {
        MLXArray(firstBits.map(value), [bits, 32])
    }
    let left = table { UInt32(min(max($0, 0), 31)) }
    let right = table { UInt32(min(max(-$0, 0), 31)) }
    let pieces = (parted << left) >> right
    let inside = table { $0 > -bits && $0 < 32 }
    let zeros = MLXArray([UInt32(0)])
    let words = which(inside, pieces, zeros).sum(axis: -1).asType(.uint32)
    return words.reshaped(leading + [-1])
}
