import CMLXShim

public enum MLXFast {
    public enum ScaledDotProductAttentionMaskMode { case none, array(MLXArray), causal }

    public static func rmsNorm(_ x: MLXArray, weight: MLXArray, eps: Float) -> MLXArray {
        MLXArray(mx_rms_norm(x.raw, weight.raw, eps))
    }
    public static func RoPE(
        _ array: MLXArray, dimensions: Int, traditional: Bool, base: Float?, scale: Float,
        offset: Int, freqs: MLXArray? = nil
    ) -> MLXArray {
        MLXArray(mx_rope(
            array.raw, Int32(dimensions), traditional, base ?? 0, scale, Int32(offset), freqs?.raw))
    }
    public static func RoPE(
        _ array: MLXArray, dimensions: Int, traditional: Bool, base: Float?, scale: Float,
        offset: MLXArray, freqs: MLXArray? = nil
    ) -> MLXArray {
        MLXArray(mx_rope_at(
            array.raw, Int32(dimensions), traditional, base ?? 0, scale, offset.raw, freqs?.raw))
    }
    public static func scaledDotProductAttention(
        queries: MLXArray, keys: MLXArray, values: MLXArray, scale: Float,
        mask: ScaledDotProductAttentionMaskMode
    ) -> MLXArray {
        switch mask {
        case .none: MLXArray(mx_sdpa(queries.raw, keys.raw, values.raw, scale, "", nil))
        case .causal: MLXArray(mx_sdpa(queries.raw, keys.raw, values.raw, scale, "causal", nil))
        case .array(let mask):
            MLXArray(mx_sdpa(queries.raw, keys.raw, values.raw, scale, "array", mask.raw))
        }
    }
}
