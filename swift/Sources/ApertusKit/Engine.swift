import ApertusCore
import ApertusMLX
import Foundation
import MLX

/// A loaded model, and what has been computed of the latest prompt; all on the thread of MLX.
package actor Engine {
    package nonisolated var unownedExecutor: UnownedSerialExecutor {
        ThreadExecutor.shared.asUnownedSerialExecutor()
    }

    package nonisolated let folder: ModelFolder
    nonisolated let plan: MemoryPlan
    nonisolated let line = Line()
    private var prefix: CachedPrefix?
    /// Where the next prompt is to be kept, and then what became of it.
    private var keeping: URL?
    private var kept: Result<Void, any Error> = .success(())

    init(_ folder: ModelFolder, _ plan: MemoryPlan) {
        (self.folder, self.plan) = (folder, plan)
    }

    /// Load the weights; `onProgress` is told the share that is done.
    ///
    /// - Returns: the type that is computed in.
    func load(
        _ type: LoadOptions.ComputeType?, _ onProgress: (@Sendable (Double) -> Void)?
    ) throws -> LoadOptions.ComputeType {
        Memory.cacheLimit = plan.bufferCacheBytes
        let model = try ApertusModel(folder: folder.url, computeType: type?.dtype) { done, total in
            onProgress?(total > 0 ? Double(done) / Double(total) : 1)
        }
        prefix = try CachedPrefix(model: model, form: plan.form)
        Memory.clearCache()
        return LoadOptions.ComputeType.allCases.first { $0.dtype == model.computeType } ?? .float32
    }

    /// Have `ask` answered when its turn comes.
    nonisolated func enqueue(_ ask: Ask) {
        line.join(ask)
        Task { await answerNext() }
    }

    private func answerNext() {
        guard let ask = line.next() else { return }
        let result = Result { if !ask.isStopped { try compute(ask) } }
        // Whoever sees its stream end finds nobody busy with it.
        line.leave()
        switch result {
        case .success: ask.finish()
        case .failure(let error): ask.finish(error)
        }
    }

    private func compute(_ ask: Ask) throws {
        let prompt = try ask.begin()
        var outcome = Outcome()
        outcome.promptTokenIDs = prompt.ids.map(Int.init)
        let result = Result { try answer(ask, prompt, &outcome) }
        outcome.peakMemory = DeviceMemory.peak
        ask.end(outcome)
        try result.get()
    }

    private func answer(_ ask: Ask, _ prompt: Ask.Prompt, _ outcome: inout Outcome) throws {
        let prefix = try require()
        let sampling = try ask.options.parameters(folder.generationConfig)
        outcome.seed = sampling.seed
        let started = ContinuousClock.now
        var first: ContinuousClock.Instant?
        var parser = prompt.parser
        func deliver(_ pieces: [Piece]) {
            for piece in pieces { outcome.answer.add(piece) }
            ask.yield(pieces)
        }
        let run = try prefix.begin(
            outcome.promptTokenIDs, sampling: sampling,
            maxTokens: min(ask.options.maxTokens, requireRoom(prompt.ids.count)),
            prefillStep: plan.prefillStep, isCancelled: { ask.isStopped }, onPrefill: ask.onPrefill)
        outcome.reusedPromptTokens = run.reused
        outcome.finishReason = .length
        do {
            if let file = keeping {
                keeping = nil
                try run.readPrefix()
                kept = Result { _ = try savePromptCache(to: file) }
            }
            while let token = try run.nextToken() {
                let now = ContinuousClock.now
                if first == nil { outcome.secondsToFirstToken = seconds(from: started, to: now) }
                first = first ?? now
                outcome.decodingSeconds = seconds(from: first ?? now, to: now)
                outcome.tokenIDs.append(token)
                let isStop = folder.stopIDs.contains(Int32(token))
                if !isStop { deliver(parser.push(Int32(token))) }
                if isStop || parser.isStopped {
                    outcome.finishReason = .stop
                    break
                }
            }
        } catch let error as ApertusError where error.kind == .cancelled {
            outcome.finishReason = .cancelled
        }
        deliver(parser.finish(isCut: outcome.finishReason != .stop))
        outcome.malformedToolCalls = parser.malformed
        outcome.stopText = parser.stopText
        let isWhole = outcome.finishReason == .length && parser.endedWithCalls
        if !outcome.answer.calls.isEmpty, outcome.finishReason == .stop || isWhole {
            outcome.finishReason = .toolCalls
        }
    }

    func require() throws -> CachedPrefix {
        guard let prefix else { throw ApertusError(.bug, "the model has not been loaded") }
        return prefix
    }

    /// The token ids of the likeliest `count` tokens after `prompt`.
    func continuation(of prompt: [Int], count: Int) throws -> [Int] {
        let run = try require().begin(
            prompt, maxTokens: count, prefillStep: plan.prefillStep,
            isCancelled: { Task.isCancelled })
        var ids: [Int] = []
        while let token = try run.nextToken() { ids.append(token) }
        return ids
    }

    /// Seconds that reading `prompt` anew takes, and then drawing `newTokens` after the first
    /// token.
    package func measure(
        _ prompt: [Int], newTokens: Int
    ) throws -> (reading: Double, drawing: Double) {
        let prefix = try require()
        try prefix.forget()
        let run = try prefix.begin(
            prompt, maxTokens: newTokens + 1, prefillStep: plan.prefillStep,
            isCancelled: { Task.isCancelled })
        let started = ContinuousClock.now
        _ = try run.nextToken()
        let read = ContinuousClock.now
        while try run.nextToken() != nil {}
        return (seconds(from: started, to: read), seconds(from: read, to: .now))
    }

    /// Finish what was stopped before its turn came, and wait until the GPU has nothing to do any
    /// more.
    func settle() {
        // The tasks that would answer them may come to this thread later than the one that settles.
        for ask in line.takeStopped() { ask.finish() }
        MLX.Stream().synchronize()
    }

    /// Hold no keys and values, and no free memory.
    func clear() throws {
        try prefix?.forget()
        Memory.clearCache()
    }

    /// End answers and hold nothing that can be computed again.
    func memoryRunsShort() { try? clear() }
}

extension Engine {
    /// Most tokens that prompt and answer may have together: as many as memory was planned for.
    nonisolated var contextLength: Int {
        // A bounded cache takes no more memory, however long the conversation.
        plan.form.bound == nil ? plan.context : folder.config.maxPositions
    }

    /// How many tokens an answer may have after a prompt of so many.
    ///
    /// - Throws: `ApertusError` of kind `usage` where there is no room for one.
    @discardableResult
    nonisolated func requireRoom(_ promptTokens: Int) throws -> Int {
        guard promptTokens < contextLength else {
            throw ApertusError(
                .usage,
                "the prompt has \(promptTokens) tokens, but the context is \(contextLength), "
                    + "answer included; shorten it, or load with a larger context")
        }
        return contextLength - promptTokens
    }
}

extension Engine {
    /// Write keys and values of the latest prompt to a file.
    ///
    /// - Returns: of how many tokens.
    func savePromptCache(to file: URL) throws -> Int {
        let prefix = try require()
        try PromptCacheFile(file, modelFolder: folder.url).save(prefix)
        return try prefix.tokens.count
    }

    /// Take over keys and values from a file, instead of those that there are.
    ///
    /// - Returns: of how many tokens.
    func restorePromptCache(from file: URL) throws -> Int {
        let prefix = try require()
        try PromptCacheFile(file, modelFolder: folder.url).restore(prefix)
        return try prefix.tokens.count
    }

    /// Take over what a file holds of `prompt`.
    ///
    /// - Throws: `ApertusError` of kind `rejected`, too, if the file is of little use for `prompt`.
    package func resume(_ file: URL, for prompt: [Int]) throws {
        let count = try restorePromptCache(from: file)
        let prefix = try require()
        let shared = zip(try prefix.tokens, prompt.dropLast()).prefix { $0 == $1 }.count
        guard 2 * shared >= count else {
            throw ApertusError(
                .rejected,
                "\(file.filePath): tokens: its \(count) differ from the prompt from position "
                    + "\(shared) on; give the prompt it was made for, or another file")
        }
        try prefix.cut(to: shared)
        guard try prefix.tokens.count == shared else {
            throw ApertusError(
                .rejected,
                "\(file.filePath): shares its first \(shared) of \(count) tokens with the prompt, "
                    + "but a cache in \(plan.form) cannot go back to them; give another file")
        }
    }

    /// Have the next prompt kept in a file, without its last token, which has to be computed anyway.
    package func keepNextPrompt(in file: URL) {
        (keeping, kept) = (file, .success(()))
    }

    /// Say whether keeping it failed: once there is an answer, which nobody should lose by it.
    package func requireKept() throws { try kept.get() }
}

private func seconds(from start: ContinuousClock.Instant, to end: ContinuousClock.Instant) -> Double
{
    let (whole, parts) = start.duration(to: end).components
    return Double(whole) + Double(parts) * 1e-18
}

extension LoadOptions.ComputeType {
    fileprivate var dtype: DType {
        switch self {
        case .bfloat16: .bfloat16
        case .float16: .float16
        case .float32: .float32
        }
    }
}
