@_exported import ApertusCore
import ApertusMLX
import Foundation

/// An Apertus model on this device, from the folder that `apertus-mlx convert` wrote.
///
/// ```swift
/// let apertus = try await Apertus(folder: modelURL) let chat = apertus.conversation(system: "You
/// answer in one sentence.") for try await piece in chat.ask("Wie heisst der höchste Berg der
/// Schweiz?") { text += piece.text }
/// ```
///
/// It needs no network. All work with MLX happens on one thread of its own, whoever asks; answers
/// are computed one at a time. When the last reference goes, so does the model's memory.
public final class Apertus: Sendable {
    /// The folder of the model.
    public let folder: URL
    /// What the model is to take of the memory, and how its caches are kept.
    public var plan: MemoryPlan { engine.plan }
    /// Most tokens that prompt and answer may have together.
    public var contextLength: Int { engine.contextLength }
    /// Whether an answer is being computed, or waits for its turn.
    public var isBusy: Bool { engine.line.isBusy }

    /// In which type activations are computed, and weights that are not quantized.
    public let computeType: LoadOptions.ComputeType
    package let engine: Engine
    private let pressure: MemoryPressure

    /// Check and load the model in `folder`.
    ///
    /// In this order: config, manifest and tokenizer are read; what the model will take is compared
    /// with the memory that there is, before any weights are opened; then sizes, names, shapes and
    /// types of all weights are checked, and they are loaded. Nothing is hashed: see
    /// `Verification`.
    ///
    /// - Parameter onProgress: is told the share of the weights that is loaded, from 0 to 1.
    /// - Throws: `ApertusError`, which names file, key or tensor and says what to do: `notFound`
    ///   without such a folder, `rejected` for a damaged or unsupported one,
    ///   `resource` where memory
    ///   does not suffice, with the number that is missing.
    public convenience init(
        folder: URL, options: LoadOptions = .init(),
        onProgress: (@Sendable (Double) -> Void)? = nil
    ) async throws {
        let opened = try ModelFolder(folder, chatTemplate: options.chatTemplate)
        try await self.init(opened, plan: opened.plan(options), options, onProgress)
    }

    /// Load a folder whose small files have been read and whose memory has been planned.
    package init(
        _ opened: ModelFolder, plan: MemoryPlan, _ options: LoadOptions,
        _ onProgress: (@Sendable (Double) -> Void)? = nil
    ) async throws {
        try opened.manifest?.checkSizes(opened.url)
        folder = opened.url
        let engine = Engine(opened, plan)
        computeType = try await engine.load(options.computeType, onProgress)
        self.engine = engine
        pressure = MemoryPressure { [weak engine] in
            guard let engine else { return }
            engine.line.stopAll(.memoryShort)
            Task { await engine.memoryRunsShort() }
        }
    }

    /// Begin a conversation.
    ///
    /// - Parameters:
    ///   - system: what the model is to be and do; nil stands for what its makers trained it with.
    ///   - thinks: whether it deliberates before it answers; deliberations come as `Piece.thought`.
    ///   - tools: what it may call; calls are in `Conversation.lastOutcome`.
    public func conversation(
        system: String? = nil, thinks: Bool = false, tools: [ToolDefinition] = []
    ) -> Conversation {
        Conversation(engine, system: system, thinks: thinks, tools: tools)
    }

    /// Continue a text as it is, without chat template.
    ///
    /// - Parameter onEnd: is told, on the thread of MLX, what the run produced and took.
    public func continuation(
        of text: String, options: AnswerOptions = .init(),
        onPrefill: (@Sendable (Int) -> Void)? = nil,
        onEnd: @escaping @Sendable (Outcome) -> Void = { _ in }
    ) -> AsyncThrowingStream<Piece, any Error> {
        let engine = engine
        return engine.stream(
            options: options, onPrefill: onPrefill,
            begin: {
                let ids = engine.folder.rawPrompt(text)
                try engine.requireRoom(ids.count)
                let parser = try AnswerParser(
                    engine.folder.tokenizer, roles: engine.folder.roles, stops: options.stops)
                return Ask.Prompt(ids: ids, parser: parser)
            },
            end: onEnd)
    }

    /// End all answers, each behind the token that is being computed; their streams finish.
    public func stop() { engine.line.stopAll(.cancelled) }

    /// End all answers, and wait until the GPU has nothing to do any more.
    ///
    /// For an app that goes to the background: there, work on the GPU ends the process. Ask nothing
    /// until it is back.
    public func stopAndWait() async {
        stop()
        await engine.settle()
    }

    /// Give back the memory of keys and values, and what MLX keeps for its next operations.
    ///
    /// Conversations go on as before; the next answer reads its prompt from the beginning. It waits
    /// for an answer that is being computed.
    public func clearCaches() async { try? await engine.clear() }

    /// Keep what has been computed of the latest prompt and its answer in a file, to go on from there
    /// another day; written whole or not at all.
    ///
    /// It is of use to a conversation that goes on with the same messages, whose own text is not in
    /// it: keep `Conversation.messages` beside it. The form is that of `apertus-mlx generate
    /// --prompt-cache`. It waits for an answer that is being computed.
    ///
    /// - Returns: of how many tokens keys and values are in the file.
    /// - Throws: `ApertusError`: of kind `usage`, if nothing has been computed, `resource`, if the file
    ///   cannot be written.
    @discardableResult
    public func savePromptCache(to file: URL) async throws -> Int {
        try await engine.savePromptCache(to: file)
    }

    /// Take over what `savePromptCache` wrote, or `apertus-mlx generate --prompt-cache`: a prompt that
    /// begins with the same tokens is not computed again.
    ///
    /// - Returns: how many tokens those are.
    /// - Throws: `ApertusError`, which names the file: of kind `notFound`, if there is none,
    ///   `rejected`, if it is damaged, or was made by another model, form of cache or type of numbers;
    ///   nothing is held then.
    @discardableResult
    public func restorePromptCache(from file: URL) async throws -> Int {
        try await engine.restorePromptCache(from: file)
    }

    /// What the app does by itself when the system says that memory runs short: answers end with an
    /// error that says so, and all caches are emptied.
    public func memoryRunsShort() async {
        engine.line.stopAll(.memoryShort)
        await engine.memoryRunsShort()
    }

    /// What MLX holds of the memory just now; asks no thread to wait.
    public var memory: MemoryUse { MemoryUse(engine.plan) }
}
