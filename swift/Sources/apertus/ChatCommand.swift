import ApertusKit
import Foundation

/// `apertus chat`: a conversation in the terminal.
enum ChatCommand {
    static let grammar = Grammar(
        command: "chat",
        words: "Talk with a model; earlier turns are not computed again. /help lists commands.",
        options: [
            ModelOptions.model, ModelOptions.system, ModelOptions.think, ModelOptions.tools,
            Option("--no-history", kind: .flag, "What is typed is never kept here."),
        ] + ModelOptions.sampling + ModelOptions.running + [
            Option(
                "--prompt-cache", kind: .text,
                "Go on from what this file holds of the prompt, and keep it there at the end.")
        ])

    static func run(_ arguments: Arguments, _ interrupts: Interrupts) async throws {
        let options = ModelOptions.answer(arguments)
        let load = try ModelOptions.load(arguments)
        let tools = try arguments.file("--tools").map(RequestFiles.tools) ?? []
        let folder = try ModelFolder(ModelOptions.folder(arguments))
        _ = try folder.chatFormat()
        let apertus = try await Apertus(folder, plan: folder.plan(load), load)
        let cache = arguments.file("--prompt-cache")
        if let cache, FileManager.default.fileExists(atPath: cache.path) {
            try await apertus.restorePromptCache(from: cache)
        }
        let chat = apertus.conversation(
            system: arguments.text("--system"), thinks: arguments.has("--think"), tools: tools)
        var talk = Talk(chat, apertus, options, interrupts)
        try await talk.run()
        if let cache, chat.lastOutcome != nil { try await apertus.savePromptCache(to: cache) }
    }
}

/// Messages and commands, one after the other, until they end.
private struct Talk {
    private let chat: Conversation
    private let apertus: Apertus
    private let options: AnswerOptions
    private let interrupts: Interrupts
    private var commands: ChatCommands
    /// Of calls of the last message.
    private var results: [ToolResult] = []
    private var asking: [ToolCall] = []

    /// Characters of a call that are repeated where its result is asked for.
    private static let mostShown = 100

    init(
        _ chat: Conversation, _ apertus: Apertus, _ options: AnswerOptions, _ interrupts: Interrupts
    ) {
        (self.chat, self.apertus, self.options) = (chat, apertus, options)
        self.interrupts = interrupts
        commands = ChatCommands(chat, apertus)
    }

    mutating func run() async throws {
        Sink.note("type a message; /help for more")
        interrupts.expect { Sink.note("\nCtrl-D ends the chat") }
        while !commands.hasEnded, let line = nextLine() {
            let request = ChatRequest(line)
            if let command = request.command {
                do {
                    let told = try await commands.run(command, request.text)
                    if let told { Sink.note(told, keeping: command == "/help" ? "\n" : "") }
                    if commands.takeRetry() { try await answer(chat.retry(options: options)) }
                } catch let error as ApertusError {
                    Sink.note(error.kind == .usage ? "\(error)" : "error: \(error)")
                }
            } else if !request.text.trimmingCharacters(in: .whitespacesAndNewlines).isEmpty {
                try await take(request.text)
            }
        }
    }

    /// The next line; one that ends with a backslash goes on.
    private mutating func nextLine() -> String? {
        if let call = waiting.first {
            let shown = "\(call.name) \(call.arguments)"
            let cut = shown.count <= Self.mostShown ? shown : "\(shown.prefix(Self.mostShown))..."
            Sink.note("what does \(cut) give?")
        }
        var lines: [String] = []
        while true {
            if isatty(0) == 1 { Sink.note(lines.isEmpty ? "> " : "  ", end: "") }
            guard let line = readLine(strippingNewline: true) else {
                return lines.isEmpty ? nil : lines.joined(separator: "\n")
            }
            guard line.hasSuffix("\\") else {
                return (lines + [line]).joined(separator: "\n")
            }
            lines.append(String(line.dropLast()))
        }
    }

    /// The calls whose results have not been typed.
    private var waiting: ArraySlice<ToolCall> {
        mutating get {
            let open = chat.openCalls
            if open != asking { (asking, results) = (open, []) }
            return open.dropFirst(results.count)
        }
    }

    /// Take a message, or the result of a call.
    private mutating func take(_ text: String) async throws {
        guard let call = waiting.first else {
            return try await answer(chat.ask(text, options: options))
        }
        results.append(ToolResult(of: call.id, text: text))
        guard waiting.isEmpty else { return }
        // After an error all of them are asked for again.
        let given = results
        (asking, results) = ([], [])
        try await answer(chat.answer(with: given, options: options))
    }

    private func answer(_ pieces: AsyncThrowingStream<Piece, any Error>) async throws {
        interrupts.expect { [apertus] in apertus.stop() }
        defer { interrupts.expect { Sink.note("\nCtrl-D ends the chat") } }
        var printer = AnswerPrinter()
        do {
            for try await piece in pieces { printer.print(piece) }
            printer.finish()
        } catch let error as ApertusError where error.kind == .usage {
            let wayOut = chat.questions > 0 ? "; /undo or /reset makes room" : ""
            Sink.note("error: \(error)\(wayOut)")
            return
        }
        if interrupts.clear() {
            let isEmpty = chat.lastOutcome?.answer.text.isEmpty ?? true
            let kept = isEmpty ? "nothing was said" : "what was said stays in the conversation"
            Sink.note("stopped; \(kept); /retry answers again")
        }
    }
}
