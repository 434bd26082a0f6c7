import ApertusCore
import MLX

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

/// Pre-norm attention with RMS-normalized queries and keys, and a feed-forward without a gate.
struct DecoderLayer {
    private let config: ModelConfig
    /// The three projections of the input, as one matrix where that changes no number.
    private let projections: [Matrix]
    private let output, up, down: Matrix
    private let queryNorm, keyNorm, attentionNorm, feedForwardNorm: MLXArray
    private let activation: XIELU
    private let rotary: Rotary
    private let scale: Float

    init(_ weights: inout Weights, _ config: ModelConfig, index: Int, rotary: Rotary) {
        let path = Layout.layer(index)
        (self.config, self.rotary) = (config, rotary)
        let apart = ["q", "k", "v"].map { weights.matrix("\(path).self_attn.\($0)_proj") }
        projections = Matrix.joined(apart).map { [$0] } ?? apart
        output = weights.matrix("\(path).self_attn.o_proj")
        up = weights.matrix("\(path).mlp.up_proj")
        down = weights.matrix("\(path).mlp.down_proj")
        queryNorm = weights.array("\(path).self_attn.q_norm.weight")
        keyNorm = weights.array("\(path).self_attn.k_norm.weight")
        attentionNorm = weights.array("\(path).attention_layernorm.weight")
        feedForwardNorm = weights.array("\(path).feedforward_layernorm.weight")
        let xielu = "\(path).mlp.act_fn"
        activation = XIELU(
            alphaP: weights.array("\(xielu).alpha_p"), alphaN: weights.array("\(xielu).alpha_n"),
            beta: weights.array("\(xielu).beta"), eps: weights.array("\(xielu).eps")
        ).evaluated()
        scale = Float(pow(Double(config.headDim), -0.5))
    }

    /// The residual stream `x` `[B, L, D]` after this layer.
    func callAsFunction(
        _ x: MLXArray, mask: MLXFast.ScaledDotProductAttentionMaskMode, cache: any LayerCache
    ) -> MLXArray {
        let h = x + attention(norm(x, attentionNorm), mask, cache)
        return h + down.times(activation(up.times(norm(h, feedForwardNorm))))
    }

    private func attention(
        _ x: MLXArray, _ mask: MLXFast.ScaledDotProductAttentionMaskMode, _ cache: any LayerCache
    ) -> MLXArray {
        let (batch, length) = (x.dim(0), x.dim(1))
        let rows = projections.map {
            $0.times(x).reshaped([batch, length, -1, config.headDim])
        }
        let (q, k, v) = rows.count == 1 ? split(rows[0]) : (rows[0], rows[1], rows[2])
        let offset = cache.offset
        let queries = rotary(norm(q, queryNorm).transposed(0, 2, 1, 3), offset: offset)
        let keys = rotary(norm(k, keyNorm).transposed(0, 2, 1, 3), offset: offset)
        let cached = cache.update(keys: keys, values: v.transposed(0, 2, 1, 3))
        let mixed = attend(queries, cached, scale: scale, mask: mask)
        return output.times(mixed.transposed(0, 2, 1, 3).reshaped([batch, length, -1]))
    }

    private func split(_ rows: MLXArray) -> (MLXArray, MLXArray, MLXArray) {
        let (keys, values) = (config.heads, config.heads + config.kvHeads)
        return (
            rows[.ellipsis, 0 ..< keys, 0...], rows[.ellipsis, keys ..< values, 0...],
            rows[.ellipsis, values..., 0...]
        )
    }

    private func norm(_ x: MLXArray, _ weight: MLXArray) -> MLXArray {
        MLXFast.rmsNorm(x, weight: weight, eps: config.rmsNormEps)
    }
}
