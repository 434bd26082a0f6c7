import ApertusKit
import Foundation

/// `apertus generate`: one prompt, one answer.
enum GenerateCommand {
    static let grammar = Grammar(
        command: "generate",
        words: "Generate an answer to PROMPT; the model's text goes to stdout, all else to stderr.",
        operands: ["[PROMPT]"],
        options: [
            ModelOptions.messages, ModelOptions.model,
            Option("--raw", kind: .flag, "Continue the prompt as text, without chat template."),
            ModelOptions.system, ModelOptions.think, ModelOptions.tools,
        ] + ModelOptions.sampling + ModelOptions.running
            + [ModelOptions.promptCache, ModelOptions.json])

    /// What is to be answered.
    private enum Request {
        /// A text that goes on.
        case raw(String)
        case conversation([Message])
    }

    static func run(_ arguments: Arguments, _ interrupts: Interrupts) async throws {
        let request = try request(arguments)
        let tools = try arguments.file("--tools").map(RequestFiles.tools) ?? []
        let thinks = arguments.has("--think")
        let options = ModelOptions.answer(arguments)
        var load = try ModelOptions.load(arguments)
        let clock = ContinuousClock()
        let started = clock.now
        let folder = try ModelFolder(ModelOptions.folder(arguments))
        let ids: [Int32] =
            switch request {
            case .raw(let text): folder.rawPrompt(text)
            case .conversation(let messages):
                try folder.chatFormat().prompt(messages, tools: tools, thinks: thinks)
            }
        load.context = min(ids.count + options.maxTokens, folder.config.maxPositions)
        let plan = try folder.plan(load)
        let apertus = try await Apertus(folder, plan: plan, load)
        let loaded = seconds(clock.now - started)
        let cache = arguments.file("--prompt-cache")
        if let cache { try await use(cache, ids, apertus) }

        let outcome = Last()
        let chat = apertus.conversation(thinks: thinks, tools: tools)
        let pieces: AsyncThrowingStream<Piece, any Error>
        switch request {
        case .raw(let text):
            pieces = apertus.continuation(of: text, options: options, onEnd: { outcome.value = $0 })
        case .conversation(let messages):
            chat.messages = messages
            pieces = chat.answer(with: [], options: options)
        }
        interrupts.expect { apertus.stop() }
        var printer = AnswerPrinter()
        for try await piece in pieces where !arguments.has("--json") { printer.print(piece) }
        let wasInterrupted = interrupts.clear()
        guard let found = outcome.value ?? chat.lastOutcome else {
            throw ApertusError(.cancelled, "interrupted")
        }
        if arguments.has("--json") {
            let name = arguments.text("--model") ?? ""
            Sink.putLine(report(found, loaded: loaded, model: name, plan).written())
        } else {
            printer.finish()
            Sink.note(found.summary)
        }
        if wasInterrupted { throw ApertusError(.cancelled, "interrupted") }
        if cache != nil { try await apertus.engine.requireKept() }
    }

    /// Go on from the file, or have it made.
    private static func use(_ file: URL, _ prompt: [Int32], _ apertus: Apertus) async throws {
        if FileManager.default.fileExists(atPath: file.path) {
            try await apertus.engine.resume(file, for: prompt.map(Int.init))
            return
        }
        let folder = file.deletingLastPathComponent().path
        guard FileManager.default.fileExists(atPath: folder) else {
            throw ApertusError(
                .usage, "--prompt-cache \(file.path): there is no folder \(folder)")
        }
        await apertus.engine.keepNextPrompt(in: file)
    }

    private static func request(_ arguments: Arguments) throws -> Request {
        let system = arguments.text("--system")
        if arguments.has("--raw") {
            for name in ["--system", "--think", "--messages", "--tools"]
            where arguments.text(name) != nil {
                throw ApertusError(.usage, "--raw has no place for \(name)")
            }
            return .raw(try prompt(arguments))
        }
        guard let file = arguments.text("--messages") else {
            let question = Message.user(try prompt(arguments))
            return .conversation((system.map { [.system($0)] } ?? []) + [question])
        }
        guard arguments.operands.isEmpty, system == nil else {
            throw ApertusError(
                .usage,
                "--messages holds the whole conversation; leave out PROMPT and --system")
        }
        if file == "-" {
            let data = FileHandle.standardInput.readDataToEndOfFile()
            return .conversation(try RequestFiles.messages(data, name: "standard input"))
        }
        return .conversation(try RequestFiles.messages(URL(fileURLWithPath: file)))
    }

    private static func prompt(_ arguments: Arguments) throws -> String {
        var text = arguments.operands.first ?? "-"
        if text == "-" {
            let data = FileHandle.standardInput.readDataToEndOfFile()
            guard let read = String(data: data, encoding: .utf8) else {
                throw ApertusError(.usage, "standard input is no UTF-8")
            }
            text = read
        }
        guard !text.isEmpty else {
            throw ApertusError(
                .usage, "the prompt is empty; pass it as an argument or on standard input")
        }
        return text
    }

    /// What `--json` prints; the keys are those of `apertus-mlx generate --json`.
    static func report(
        _ outcome: Outcome, loaded: Double, model: String, _ plan: MemoryPlan
    ) -> Report {
        let calls = outcome.answer.calls.map { call in
            Report.object([
                ("id", .text(call.id ?? "")), ("name", .text(call.name)),
                ("arguments", .text(call.arguments)),
            ])
        }
        return .object([
            ("text", .text(outcome.answer.text)),
            ("thoughts", .text(outcome.answer.thoughts)),
            ("message", outcome.message.report),
            ("token_ids", .integers(outcome.tokenIDs)),
            ("prompt_token_ids", .integers(outcome.promptTokenIDs)),
            ("finish_reason", .text(outcome.finishReason.rawValue)),
            ("reused_prompt_tokens", .integer(outcome.reusedPromptTokens)),
            ("prefill_tokens_per_s", .number(outcome.prefillTokensPerSecond)),
            ("decode_tokens_per_s", .number(outcome.decodeTokensPerSecond)),
            ("time_to_first_token_s", .number(outcome.secondsToFirstToken)),
            ("peak_memory_bytes", .integer(outcome.peakMemory)),
            ("seed", .integer(Int(clamping: outcome.seed))),
            ("tool_calls", .list(calls)),
            ("malformed_tool_calls", .integer(outcome.malformedToolCalls)),
            ("stop_string", outcome.stopText.map { .text($0) } ?? .null),
            ("speculation", .null),
            ("load_s", .number(loaded)),
            ("model", .text(model)),
            ("prompt_tokens", .integer(outcome.promptTokenIDs.count)),
            ("generated_tokens", .integer(outcome.tokenIDs.count)),
            ("memory", memory(plan)),
        ])
    }

    /// What was chosen and what it is to take, in bytes.
    static func memory(_ plan: MemoryPlan) -> Report {
        let parts = plan.footprint
        return .object([
            ("cache", .text("\(plan.form)")), ("prefill_step", .integer(plan.prefillStep)),
            ("limit_bytes", .integer(plan.limitBytes)),
            ("weights_bytes", .integer(parts.weightsBytes)), ("kv_bytes", .integer(parts.kvBytes)),
            ("prefill_bytes", .integer(parts.prefillBytes)),
            ("logits_bytes", .integer(parts.logitsBytes)),
            // Python counts here what its CPU path takes beside MLX.
            ("process_bytes", .integer(0)), ("loading_bytes", .integer(0)),
            ("total_bytes", .integer(parts.totalBytes)),
        ])
    }
}

/// What a run leaves behind on the thread of MLX.
private final class Last: @unchecked Sendable {
    private let lock = NSLock()
    private var held: Outcome?
    var value: Outcome? {
        get { lock.withLock { held } }
        set { lock.withLock { held = newValue } }
    }
}

func seconds(_ duration: Duration) -> Double {
    let (whole, parts) = duration.components
    return Double(whole) + Double(parts) * 1e-18
}
