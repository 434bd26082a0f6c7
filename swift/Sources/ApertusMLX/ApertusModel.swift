import ApertusCore
import Foundation
import MLX

/// Apertus: a dense decoder with grouped-query attention, QK-norm and xIELU.
///
/// Every call belongs on one thread, see `ThreadExecutor`.
public struct ApertusModel {
    /// What the folder's `config.json` says.
    public let config: ModelConfig
    /// The type of activations, and of weights that are not quantized.
    public let computeType: DType

    private let embedding: EmbeddingTable
    private let layers: [DecoderLayer]
    private let norm: MLXArray
    private let head: Matrix

    /// Load the model in `folder`, ready to run.
    ///
    /// - Parameters:
    ///   - folder: `config.json` and safetensors, written by `apertus-mlx convert` or Hugging Face.
    ///   - computeType: `.bfloat16`, `.float16` or `.float32`; nil stands for bfloat16 where all
    ///     weights are stored so and a GPU computes, else float32.
    ///   - onBytes: is told the bytes read so far and in all.
    /// - Throws: `ApertusError`: a tensor is missing, left over, or of another shape or type than
    ///   the config says (known before any array is read), or a file is damaged.
    public init(
        folder: URL, computeType: DType? = nil, onBytes: ((Int, Int) -> Void)? = nil
    ) throws {
        try self.init(Checkpoint(folder: folder), computeType: computeType, onBytes: onBytes)
    }

    /// Load a model whose folder has been checked; see `init(folder:computeType:onBytes:)`.
    public init(
        _ checkpoint: Checkpoint, computeType: DType? = nil, onBytes: ((Int, Int) -> Void)? = nil
    ) throws {
        let config = checkpoint.config
        var weights = try Weights(checkpoint, computeType: computeType, onBytes: onBytes)
        (self.config, self.computeType) = (config, weights.computeType)
        (embedding, layers, norm, head) = try catchingMLX("\(checkpoint.folder.path): loading") {
            let embedding = EmbeddingTable(weights.matrix(Layout.embedding))
            let rotary = Rotary(config)
            let layers = (0 ..< config.layers).map { index in
                let layer = DecoderLayer(&weights, config, index: index, rotary: rotary)
                Memory.clearCache()
                return layer
            }
            let head = config.tiesEmbeddings
                ? embedding.matrix : weights.matrix(Layout.head)
            return (embedding, layers, weights.array("\(Layout.finalNorm).weight"), head)
        }
    }

    /// An empty cache for each layer.
    ///
    /// - Throws: `ApertusError` of kind `usage`: heads of this model cannot be kept in this form.
    func makeCache(_ form: CacheForm = .full) throws -> [any LayerCache] {
        try layers.map { _ in try makeLayerCache(form, headDim: config.headDim) }
    }

    /// Final hidden states `[1, L, D]` of the token ids `ids` `[1, L]` behind what `cache` holds.
    func hidden(_ ids: MLXArray, cache: [any LayerCache]) -> MLXArray {
        var x = embedding(ids)
        // All layers are in the same state, so the first one speaks for all.
        let mask = cache[0].mask(count: ids.dim(1))
        for (layer, kept) in zip(layers, cache) { x = layer(x, mask: mask, cache: kept) }
        return MLXFast.rmsNorm(x, weight: norm, eps: config.rmsNormEps)
    }

    /// Logits `[1, L, vocabulary]` of final hidden states.
    func logits(_ hidden: MLXArray) -> MLXArray { head.times(hidden) }

    /// Logits `[vocabulary]` after the last of `ids` `[1, L]`; no others are computed.
    func nextTokenLogits(_ ids: MLXArray, cache: [any LayerCache]) -> MLXArray {
        let states = hidden(ids, cache: cache)
        return logits(states[0..., (ids.dim(1) - 1)..., 0...]).reshaped([-1])
    }
}
