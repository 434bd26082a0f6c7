import ApertusCore
import MLX

/// Rotary position embedding over the whole head, half-rotated (not interleaved).
public struct Rotary {
    let headDim: Int
    let wavelengths: MLXArray

    /// With the base and the scaling that the config says.
    public init(_ config: ModelConfig) {
        headDim = config.headDim
        wavelengths = MLXArray(config.wavelengths)
    }

    /// Rotate `x` `[B, heads, L, headDim]`, whose first position is `offset`.
    public func callAsFunction(_ x: MLXArray, offset: Int) -> MLXArray {
        MLXFast.RoPE(
            x, dimensions: headDim, traditional: false, base: nil, scale: 1, offset: offset,
            freqs: wavelengths)
    }

    /// The same with an offset `[]`, or of each row `[B]`, that need not have been computed yet.
    public func callAsFunction(_ x: MLXArray, offset: MLXArray) -> MLXArray {
        MLXFast.RoPE(
            x, dimensions: headDim, traditional: false, base: nil, scale: 1, offset: offset,
            freqs: wavelengths)
    }
}
