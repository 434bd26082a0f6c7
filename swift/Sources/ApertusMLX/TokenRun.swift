import ApertusCore
import MLX

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
    /// Tokens of the prompt that have been read, those reused included.
    private var readTokens: Int
    /// The token that comes next, being computed, and the logits that it was drawn by.
    private var next: (token: MLXArray, logits: MLXArray)?

    /// Positions after which MLX's pool of free buffers is emptied, or it would grow for ever.
    private static let clearInterval = 256

    init(
        prefix: CachedPrefix, owner: Int, prompt: [Int], reused: Int,
        sampling: SamplingParameters, maxTokens: Int, prefillStep: Int,
        isCancelled: @escaping () -> Bool, onPrefill: ((Int) -> Void)?
    ) {
        (self.prefix, self.owner, self.prompt, self.reused) = (prefix, owner, prompt, reused)
        (self.maxTokens, self.prefillStep) = (maxTokens, prefillStep)
        (self.isCancelled, self.onPrefill, readTokens) = (isCancelled, onPrefill, reused)
        sampler = Sampler(sampling, prompt: prompt, vocabSize: prefix.model.config.outputVocabSize)
    }

    /// The next token id; nil after `maxTokens`. The first call reads the prompt.
    ///
    /// The step after a token has begun before the token is read, so that a GPU never waits: the
    /// last token returned may have been computed already.
    ///
    /// - Throws: `ApertusError`: `cancelled`, when `isCancelled` says so; `rejected`, when logits
    ///   are not finite or all the same (looked at for the first token, and where id 0 is drawn);
    ///   `bug`, when another run has taken the prefix.
    public func nextToken() throws -> Int? {
        guard drawn < maxTokens else { return nil }
        try requireOwner()
        try requireNotCancelled()
        if drawn == 0 { next = try draw(try read(to: prompt.count)) }
        let (token, logits) = next!
        next = drawn + 1 < maxTokens ? try draw(try prefix.step(token)) : nil
        let value = try catchingMLX("decoding") { Int(token.item(Int32.self)) }
        // Where the logits tell nothing apart token 0 is drawn by greedy choice.
        if drawn == 0 || value == 0 { try requireSound(logits) }
        drawn += 1
        if drawn % Self.clearInterval == 0 { Memory.clearCache() }
        return value
    }

    /// Read all of the prompt but its last token: what the prefix then holds is of use to every
    /// answer to this prompt, whatever its form.
    ///
    /// - Throws: see `nextToken`.
    public func readPrefix() throws {
        try requireOwner()
        try requireNotCancelled()
        if readTokens < prompt.count - 1 { _ = try read(to: prompt.count - 1) }
    }

    /// The logits after the first `end` tokens of the prompt, of which not all have been read.
    private func read(to end: Int) throws -> MLXArray {
        let logits = try prefix.read(Array(prompt[readTokens ..< end]), step: prefillStep) { done in
            onPrefill?(done)
            if done < prompt.count { try requireNotCancelled() }
        }
        readTokens = end
        return logits
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
