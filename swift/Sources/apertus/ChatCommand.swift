import ApertusKit
import Foundation

/// `apertus chat`: a conversation in the terminal.
enum ChatCommand {
    static let grammar = Grammar(
        command: "chat",
        words: "Talk with a model; earlier turns are not computed again. /help lists commands.",
        options: [ModelOptions.model, ModelOptions.system, ModelOptions.think]
            + ModelOptions.sampling + ModelOptions.running)

    private static let help = """
        /undo                 forget the last question and its answer
        /retry                answer the last question again
        /reset                forget all but the system message
        /think on|off         let the model deliberate first
        /stats                tell what the last answer took
        /help                 list the commands
        /exit                 leave

        // at the front sends a message that begins with a slash.
        Ctrl-C stops an answer; Ctrl-D on an empty line leaves.
        """

    static func run(_ arguments: Arguments, _ interrupts: Interrupts) async throws {
        let options = ModelOptions.answer(arguments)
        let load = try ModelOptions.load(arguments)
        let folder = try ModelFolder(ModelOptions.folder(arguments))
        _ = try folder.chatFormat()
        let apertus = try await Apertus(folder, plan: folder.plan(load), load)
        let system = arguments.text("--system")
        var chat = apertus.conversation(system: system, thinks: arguments.has("--think"))
        Sink.note("type a message; /help for more")
        interrupts.expect { Sink.note("\nCtrl-D ends the chat") }
        while let line = prompted() {
            let text = line.trimmingCharacters(in: .whitespacesAndNewlines)
            guard !text.isEmpty else { continue }
            guard text.hasPrefix("/"), !text.hasPrefix("//") else {
                let message = text.hasPrefix("//") ? String(text.dropFirst()) : line
                try await answer(chat.ask(message, options: options), chat, apertus, interrupts)
                continue
            }
            switch text {
            case "/undo":
                Sink.note(chat.undo() ? "forgot the last question" : "there is nothing to undo")
            case "/retry": try await answer(chat.retry(options: options), chat, apertus, interrupts)
            case "/reset":
                chat = apertus.conversation(system: system, thinks: chat.thinks)
                Sink.note("forgot the conversation")
            case "/think on", "/think off":
                chat.thinks = text.hasSuffix("on")
                Sink.note("the model \(chat.thinks ? "deliberates" : "does not deliberate") first")
            case "/stats": Sink.note(chat.lastOutcome?.summary ?? "nothing has been answered yet")
            case "/help": Sink.note(help, keeping: "\n")
            case "/exit": return
            default:
                let word = text.prefix { $0 != " " }
                Sink.note(
                    "\(word): unknown; /help lists the commands, /\(word) sends it as a message")
            }
        }
    }

    private static func prompted() -> String? {
        if isatty(0) == 1 { Sink.note("> ", end: "") }
        return readLine(strippingNewline: true)
    }

    private static func answer(
        _ pieces: AsyncThrowingStream<Piece, any Error>, _ chat: Conversation, _ apertus: Apertus,
        _ interrupts: Interrupts
    ) async throws {
        interrupts.expect { apertus.stop() }
        defer { interrupts.expect { Sink.note("\nCtrl-D ends the chat") } }
        var printer = AnswerPrinter()
        do {
            for try await piece in pieces { printer.print(piece) }
            printer.finish()
        } catch let error as ApertusError where error.kind == .usage {
            Sink.note("error: \(error); /undo or /reset makes room")
            return
        }
        if interrupts.clear() {
            Sink.note("stopped; what was said stays in the conversation; /retry answers again")
        }
    }
}
