/// A weight matrix `path.weight` of shape `[rows, columns]`: the part that is quantized.
public struct MatrixLayout: Sendable, Equatable {
    /// The path of its module.
    public let path: String
    public let rows, columns: Int

    /// The name of the weight tensor.
    public var weight: String { "\(path).weight" }
}

/// The names and shapes of every tensor of an Apertus checkpoint, from its config alone.
public enum Layout {
    public static let embedding = "model.embed_tokens"
    public static let head = "lm_head"
    public static let finalNorm = "model.norm"

    /// The path of a decoder layer.
    public static func layer(_ index: Int) -> String { "model.layers.\(index)" }

    /// The embedding, the projections of each layer and, when untied, the head, in that order.
    public static func matrices(_ config: ModelConfig) -> [MatrixLayout] {
        let (hidden, inner) = (config.hiddenSize, config.intermediateSize)
        let (queries, keys) = (config.heads * config.headDim, config.kvHeads * config.headDim)
        var found = [MatrixLayout(path: embedding, rows: config.vocabSize, columns: hidden)]
        for index in 0 ..< config.layers {
            let (attention, mlp) = ("\(layer(index)).self_attn", "\(layer(index)).mlp")
            found += [
                MatrixLayout(path: "\(attention).q_proj", rows: queries, columns: hidden),
                MatrixLayout(path: "\(attention).k_proj", rows: keys, columns: hidden),
                MatrixLayout(path: "\(attention).v_proj", rows: keys, columns: hidden),
                MatrixLayout(path: "\(attention).o_proj", rows: hidden, columns: queries),
                MatrixLayout(path: "\(mlp).up_proj", rows: inner, columns: hidden),
                MatrixLayout(path: "\(mlp).down_proj", rows: hidden, columns: inner),
            ]
        }
        if !config.tiesEmbeddings {
            found.append(MatrixLayout(path: head, rows: config.outputVocabSize, columns: hidden))
        }
        return found
    }

    /// Norm weights and xIELU's parameters, with the shapes that Hugging Face stores: alphas before
    /// softplus as `[1]`, beta and eps as scalars.
    public static func vectors(_ config: ModelConfig) -> [(name: String, shape: [Int])] {
        (0 ..< config.layers).flatMap { index in
            let path = layer(index)
            return [
                ("\(path).attention_layernorm.weight", [config.hiddenSize]),
                ("\(path).feedforward_layernorm.weight", [config.hiddenSize]),
                ("\(path).self_attn.q_norm.weight", [config.headDim]),
                ("\(path).self_attn.k_norm.weight", [config.headDim]),
                ("\(path).mlp.act_fn.alpha_p", [1]), ("\(path).mlp.act_fn.alpha_n", [1]),
                ("\(path).mlp.act_fn.beta", []), ("\(path).mlp.act_fn.eps", []),
            ]
        } + [("\(finalNorm).weight", [config.hiddenSize])]
    }

    /// Number of parameters, xIELU's scalars not counted (as in the models' cards).
    public static func parameterCount(_ config: ModelConfig) -> Int {
        // A hostile config describes more than an Int holds.
        let matrices = matrices(config).reduce(0.0) { $0 + Double($1.rows) * Double($1.columns) }
        let norms = vectors(config).filter { $0.name.hasSuffix(".weight") }
        return Int(min(norms.reduce(matrices) { $0 + Double($1.shape[0]) }, 1e18))
    }
}
