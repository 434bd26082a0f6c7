import ApertusCore
import MLX

/// A prefix of tokens whose keys and values have been computed by a model.
///
/// `begin` starts a run: what the prefix shares with the prompt stays, the rest is cut away. The
/// latest run owns the prefix; an older one can go no further. However a run ends (a stop, a
/// cancellation, an error), ids and caches agree afterwards.
///
/// Not for several threads; see `ThreadExecutor`.
public final class CachedPrefix {
    /// The model that computes it.
    public let model: ApertusModel
    /// How keys and values are kept.
    public let form: CacheForm

    private var layers: [any LayerCache]
    private var known: [Int] = []
    /// The token behind `known`, whose id has not been read yet: decoding runs ahead.
    private var pending: MLXArray?
    /// Counts owners; a run that is not the latest may go no further.
    private(set) var owner = 0

    /// An empty prefix.
    ///
    /// - Throws: `ApertusError` of kind `usage`: heads of the model cannot be kept in this form.
    public init(model: ApertusModel, form: CacheForm = .full) throws {
        (self.model, self.form) = (model, form)
        layers = try model.makeCache(form)
    }

    /// The ids of all tokens held; waits for one that is still being computed.
    public var tokens: [Int] {
        get throws {
            if let pending {
                self.pending = nil
                try forgettingOnError {
                    known.append(try catchingMLX("decoding") { Int(pending.item(Int32.self)) })
                }
            }
            return known
        }
    }

    /// Bytes allocated for keys and values.
    public var bytes: Int { layers.flatMap(\.arrays).reduce(0) { $0 + $1.nbytes } }

    /// Start a run over `prompt`; its last token is always left to compute.
    ///
    /// - Parameters:
    ///   - maxTokens: most tokens that are drawn.
    ///   - prefillStep: tokens of the prompt that are computed at a time.
    ///   - isCancelled: is asked after each token, and chunk of the prompt, whether to end here.
    ///   - onPrefill: is told how many tokens of the prompt are done, those reused included.
    /// - Throws: `ApertusError` of kind `usage`: the prompt is empty, or has an id that is none.
    public func begin(
        _ prompt: [Int], sampling: SamplingParameters = .greedy, maxTokens: Int,
        prefillStep: Int = 512, isCancelled: @escaping () -> Bool = { Task.isCancelled },
        onPrefill: ((Int) -> Void)? = nil
    ) throws -> TokenRun {
        guard !prompt.isEmpty else { throw ApertusError(.usage, "the prompt is empty") }
        guard prefillStep > 0 else {
            throw ApertusError(.usage, "--prefill-step \(prefillStep): expected 1 or more")
        }
        if let id = prompt.first(where: { !(0 ..< model.config.vocabSize).contains($0) }) {
            throw ApertusError(
                .usage, "token \(id): the vocabulary ends at \(model.config.vocabSize - 1)")
        }
        try cut(to: sharedLength(try tokens, prompt.dropLast()))
        return TokenRun(
            prefix: self, owner: owner, prompt: prompt, reused: known.count, sampling: sampling,
            maxTokens: maxTokens, prefillStep: prefillStep, isCancelled: isCancelled,
            onPrefill: onPrefill)
    }

    /// Hold only the first `length` tokens; none, where the form of the cache cannot go back.
    public func cut(to length: Int) throws {
        owner += 1
        let excess = try tokens.count - length
        guard excess > 0 else { return }
        guard layers.allSatisfy({ $0.offset == known.count }),
            layers.allSatisfy({ $0.trim(excess) })
        else {
            try forget()
            return
        }
        known.removeLast(excess)
    }

    /// Hold nothing any more.
    public func forget() throws {
        owner += 1
        layers = try model.makeCache(form)
        (known, pending) = ([], nil)
    }

    /// What `restore` needs beside the tokens: arrays by name, for each layer.
    public func export() throws -> [[String: MLXArray]] {
        _ = try tokens
        return layers.map { known.isEmpty ? [:] : $0.export() }
    }

    /// Take over what a prefix of the same model and form exported when it held `tokens`.
    ///
    /// - Throws: `ApertusError` of kind `rejected`: a token is none, or an array is missing, or of
    ///   another shape or type than model, form and number of tokens say; nothing is held then.
    public func restore(tokens: [Int], layers arrays: [[String: MLXArray]]) throws {
        try forget()
        guard !tokens.isEmpty else { return }
        guard tokens.allSatisfy({ (0 ..< model.config.vocabSize).contains($0) }),
            arrays.count == layers.count
        else { throw ApertusError(.rejected, "the cache is not one of this model") }
        for (index, (kept, wanted)) in zip(arrays, exported(tokens.count)).enumerated() {
            let differing = Set(kept.keys).union(wanted.keys).sorted().first { name in
                guard let wanted = wanted[name] else { return true }
                guard let array = kept[name] else { return !wanted.isOptional }
                return array.shape != wanted.shape || array.dtype != wanted.type
            }
            if let differing {
                throw ApertusError(
                    .rejected,
                    "layer \(index), \(differing.prefix(40)): not what a cache of this model and "
                        + "form holds after \(tokens.count) tokens")
            }
        }
        try forgettingOnError {
            try catchingMLX("restoring a cache") {
                for (layer, kept) in zip(layers, arrays) {
                    layer.restore(kept, positions: tokens.count)
                }
                eval(layers.flatMap(\.arrays))
            }
        }
        known = tokens
    }

    /// What `export` gives after so many tokens, for each layer.
    func exported(_ positions: Int) -> [[String: ExportedArray]] {
        let (heads, width) = (model.config.kvHeads, model.config.headDim)
        return layers.map {
            $0.exported(positions, kvHeads: heads, headDim: width, type: model.computeType)
        }
    }

    /// Compute `ids`, and return the logits `[vocabulary]` after them.
    func read(
        _ ids: [Int], step: Int, onChunk: (Int) throws -> Void
    ) throws -> MLXArray {
        _ = try tokens
        let held = known.count
        return try forgettingOnError {
            try prefill(model, ids, cache: layers, step: step) { done in
                known += ids[known.count - held ..< done]
                try onChunk(known.count)
            }
        }
    }

    /// Logits after one more token (shape `[]`), which need not have been computed yet.
    func step(_ token: MLXArray) throws -> MLXArray {
        _ = try tokens
        return try forgettingOnError {
            let logits = try catchingMLX("decoding") {
                model.nextTokenLogits(token.reshaped([1, 1]), cache: layers)
            }
            pending = token
            return logits
        }
    }

    /// After a cancellation ids and caches agree; after anything else nobody knows.
    private func forgettingOnError<R>(_ body: () throws -> R) throws -> R {
        do {
            return try body()
        } catch let error as ApertusError where error.kind == .cancelled {
            throw error
        } catch {
            try forget()
            throw error
        }
    }
}

/// How many tokens `a` and `b` begin with alike.
private func sharedLength(_ a: [Int], _ b: ArraySlice<Int>) -> Int {
    zip(a, b).prefix { $0 == $1 }.count
}
