import ApertusKit
import Foundation

/// `apertus generate`: one prompt, one answer.
enum GenerateCommand {
    static let grammar = Grammar(
        command: "generate",
        words: "Generate an answer to PROMPT; the model's text goes to stdout, all else to stderr.",
        operands: ["[PROMPT]"],
        options: [
            ModelOptions.model,
            Option("--raw", kind: .flag, "Continue the prompt as text, without chat template."),
            ModelOptions.system, ModelOptions.think,
        ] + ModelOptions.sampling + ModelOptions.running + [ModelOptions.json])

    static func run(_ arguments: Arguments, _ interrupts: Interrupts) async throws {
        let prompt = try prompt(arguments)
        let isRaw = arguments.has("--raw")
        if isRaw, arguments.text("--system") != nil || arguments.has("--think") {
            throw ApertusError(.usage, "--raw has no place for --system or --think")
        }
        let options = ModelOptions.answer(arguments)
        var load = try ModelOptions.load(arguments)
        let clock = ContinuousClock()
        let started = clock.now
        let folder = try ModelFolder(ModelOptions.folder(arguments))
        let messages =
            (arguments.text("--system").map { [Message.system($0)] } ?? []) + [.user(prompt)]
        let count =
            isRaw
            ? folder.rawPrompt(prompt).count
            : try folder.chatFormat().prompt(messages, thinks: arguments.has("--think")).count
        load.context = min(count + options.maxTokens, folder.config.maxPositions)
        let plan = try folder.plan(load)
        let apertus = try await Apertus(folder, plan: plan, load)
        let loaded = seconds(clock.now - started)

        let outcome = Last()
        let chat = apertus.conversation(
            system: arguments.text("--system"), thinks: arguments.has("--think"))
        let pieces =
            isRaw
            ? apertus.continuation(of: prompt, options: options, onEnd: { outcome.value = $0 })
            : chat.ask(prompt, options: options)
        interrupts.expect { apertus.stop() }
        var printer = AnswerPrinter()
        for try await piece in pieces where !arguments.has("--json") { printer.print(piece) }
        let wasInterrupted = interrupts.clear()
        guard let found = isRaw ? outcome.value : chat.lastOutcome else {
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
            ("message", message(outcome)),
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
            ("load_s", .number(loaded)),
            ("model", .text(model)),
            ("prompt_tokens", .integer(outcome.promptTokenIDs.count)),
            ("generated_tokens", .integer(outcome.tokenIDs.count)),
            ("memory", memory(plan)),
        ])
    }

    /// The answer as an assistant's message of OpenAI's API, to go on from.
    private static func message(_ outcome: Outcome) -> Report {
        guard case .assistant(let text, let thoughts, let calls) = outcome.message else { return .null }
        let content: Report = text.isEmpty && !calls.isEmpty ? .null : .text(text)
        var members: [(String, Report)] = [("role", .text("assistant")), ("content", content)]
        if !thoughts.isEmpty { members.append(("reasoning_content", .text(thoughts))) }
        if !calls.isEmpty {
            let list = calls.map { call in
                let function = Report.object([
                    ("name", .text(call.name)), ("arguments", .text(call.arguments)),
                ])
                return Report.object([
                    ("id", .text(call.id ?? "")), ("type", .text("function")),
                    ("function", function),
                ])
            }
            members.append(("tool_calls", .list(list)))
        }
        return .object(members)
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
