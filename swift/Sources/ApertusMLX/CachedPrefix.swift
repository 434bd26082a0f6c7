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
    fileprivate private(set) var owner = 0

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
                known.append(try catchingMLX("decoding") { Int(pending.item(Int32.self)) })
                self.pending = nil
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
    public func restore(tokens: [Int], layers arrays: [[String: MLXArray]]) throws {
        try forget()
        guard !tokens.isEmpty else { return }
        try catchingMLX("restoring a cache") {
            for (layer, kept) in zip(layers, arrays) {
                layer.restore(kept, positions: tokens.count)
            }
            eval(layers.flatMap(\.arrays))
        }
        known = tokens
    }

    /// Compute `ids`, and return the logits `[vocabulary]` after them.
    fileprivate func read(
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
    fileprivate func step(_ token: MLXArray) throws -> MLXArray {
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

/// One prompt and what is drawn after it, on a prefix that belongs to this run until the next.
public final class TokenRun {
    /// Tokens of the prompt that the prefix held already.
    public let reused: Int
    /// Tokens drawn so far.
    public private(set) var drawn = 0

    private let prefix: CachedPrefix
    private let owner: Int
    private let prompt: [Int]
    private let maxTokens, prefillStep: Int
    private let isCancelled: () -> Bool
    private let onPrefill: ((Int) -> Void)?
    private var sampler: Sampler
    /// The token that comes next, being computed, and the logits that it was drawn by.
    private var next: (token: MLXArray, logits: MLXArray)?

    /// Positions after which MLX's pool of free buffers is emptied, so that it does not grow for ever.
    private static let clearInterval = 256

    fileprivate init(
        prefix: CachedPrefix, owner: Int, prompt: [Int], reused: Int,
        sampling: SamplingParameters, maxTokens: Int, prefillStep: Int,
        isCancelled: @escaping () -> Bool, onPrefill: ((Int) -> Void)?
    ) {
        (self.prefix, self.owner, self.prompt, self.reused) = (prefix, owner, prompt, reused)
        (self.maxTokens, self.prefillStep) = (maxTokens, prefillStep)
        (self.isCancelled, self.onPrefill) = (isCancelled, onPrefill)
        sampler = Sampler(sampling, prompt: prompt, vocabSize: prefix.model.config.outputVocabSize)
    }

    /// The next token id; nil after `maxTokens`. The first call reads the prompt.
    ///
    /// The step after a token has begun before the token is read, so that a GPU never waits: the last
    /// token returned may have been computed already.
    ///
    /// - Throws: `ApertusError`: `cancelled`, when `isCancelled` says so; `rejected`, when the logits
    ///   are not finite or all the same (looked at for the first token, and wherever id 0 is drawn);
    ///   `bug`, when another run has taken the prefix.
    public func nextToken() throws -> Int? {
        guard drawn < maxTokens else { return nil }
        try requireOwner()
        try requireNotCancelled()
        if drawn == 0 {
            let logits = try prefix.read(Array(prompt[reused...]), step: prefillStep) { done in
                onPrefill?(done)
                if done < prompt.count { try requireNotCancelled() }
            }
            next = try draw(logits)
        }
        let (token, logits) = next!
        next = drawn + 1 < maxTokens ? try draw(try prefix.step(token)) : nil
        let value = try catchingMLX("decoding") { Int(token.item(Int32.self)) }
        // Where the logits tell nothing apart token 0 is drawn by greedy choice.
        if drawn == 0 || value == 0 { try requireSound(logits) }
        drawn += 1
        if drawn % Self.clearInterval == 0 { Memory.clearCache() }
        return value
    }

    private func draw(_ logits: MLXArray) throws -> (MLXArray, MLXArray) {
        try catchingMLX("drawing a token") {
            let token = sampler(logits)
            asyncEval([token])
            return (token, logits)
        }
    }

    private func requireOwner() throws {
        guard prefix.owner == owner else {
            throw ApertusError(
                .bug, "this run is over: its cache was cut, or taken by another run")
        }
    }

    private func requireNotCancelled() throws {
        if isCancelled() { throw ApertusError(.cancelled, "cancelled") }
    }

    private func requireSound(_ logits: MLXArray) throws {
        let values = try catchingMLX("decoding") { logits.asType(.float32).asArray(Float.self) }
        let isFinite = values.allSatisfy(\.isFinite)
        guard isFinite, values.count == 1 || values.contains(where: { $0 != values[0] }) else {
            try prefix.forget()
            throw ApertusError(
                .rejected,
                "the model computed no finite logits, or all equal, at token \(drawn + 1): its "
                    + "weights are damaged or overflow in this type; try --dtype float32")
        }
    }
}

/// How many tokens `a` and `b` begin with alike.
private func sharedLength(_ a: [Int], _ b: ArraySlice<Int>) -> Int {
    zip(a, b).prefix { $0 == $1 }.count
}
