import ApertusKit
import Foundation

/// What somebody typed: a command and what stands behind it, or no command and a message.
struct ChatRequest: Equatable {
    let command: String?
    let text: String

    /// `//` at the front is a message's own slash. What has blanks is a message, unless it begins with
    /// a command: `/usr/bin is a folder`.
    init(_ line: String) {
        let trimmed = line.trimmingCharacters(in: .whitespacesAndNewlines)
        let first = String(trimmed.prefix { !$0.isWhitespace })
        let isKnown = ChatCommands.all.contains { $0.name == first }
        if trimmed.hasPrefix("//") {
            (command, text) = (nil, String(trimmed.dropFirst()))
        } else if isKnown || (first.hasPrefix("/") && first == trimmed) {
            let rest = trimmed.dropFirst(first.count)
            (command, text) = (first, rest.trimmingCharacters(in: .whitespacesAndNewlines))
        } else {
            (command, text) = (nil, line)
        }
    }
}

/// What begins with a slash in a chat: commands, each of which says what it did.
struct ChatCommands {
    struct Command {
        let name: String
        /// What may stand behind it, for people.
        let takes: String
        let words: String
        fileprivate let run: (inout ChatCommands, String) async throws -> String?
    }

    /// Whether somebody asked to leave.
    private(set) var hasEnded = false
    private var wantsRetry = false
    private let chat: Conversation
    private let apertus: Apertus
    /// What `/save` wrote or `/load` read last.
    private var file: URL?

    init(_ chat: Conversation, _ apertus: Apertus) { (self.chat, self.apertus) = (chat, apertus) }

    static var all: [Command] {
        [
            Command(
                name: "/undo", takes: "", words: "forget the last question and its answer",
                run: { commands, _ in try commands.undo() }),
            Command(
                name: "/retry", takes: "", words: "answer the last question again",
                run: { commands, _ in try commands.retry() }),
            Command(
                name: "/reset", takes: "", words: "forget all but the system message",
                run: { commands, _ in await commands.reset() }),
            Command(
                name: "/system", takes: "[TEXT|off]", words: "show or set the system message",
                run: { $0.system($1) }),
            Command(
                name: "/think", takes: "[on|off]", words: "let the model deliberate first",
                run: { try $0.think($1) }),
            Command(
                name: "/save", takes: "FILE", words: "write the messages as JSON; /save! replaces",
                run: { try $0.save($1, replaces: false) }),
            Command(
                name: "/save!", takes: "FILE", words: "", run: { try $0.save($1, replaces: true) }),
            Command(
                name: "/load", takes: "FILE", words: "go on from messages in a file",
                run: { try $0.load($1) }),
            Command(
                name: "/stats", takes: "", words: "tell what the last answer took",
                run: { commands, _ in commands.stats }),
            Command(
                name: "/help", takes: "", words: "list the commands", run: { _, _ in Self.help }),
            Command(
                name: "/exit", takes: "", words: "leave",
                run: { commands, _ in
                    commands.hasEnded = true
                    return nil
                }),
        ]
    }

    static var help: String {
        let rows = all.filter { !$0.words.isEmpty }.map { command in
            "\(command.name) \(command.takes)"
                .padding(toLength: 22, withPad: " ", startingAt: 0) + command.words
        }
        return rows.joined(separator: "\n") + """


            \\ at the end of a line begins another line of the message.
            // at the front sends a message that begins with a slash.
            Ctrl-C stops an answer; Ctrl-D on an empty line leaves.
            """
    }

    /// Do what a command says.
    ///
    /// - Returns: what to tell, a line except for `/help`.
    /// - Throws: `ApertusError`: it cannot be done; the conversation is as it was.
    mutating func run(_ name: String, _ text: String) async throws -> String? {
        guard let command = Self.all.first(where: { $0.name == name }) else {
            throw Self.wrong(
                "\(name): unknown; /help lists the commands, and /\(name) sends it as a message")
        }
        if !text.isEmpty, command.takes.isEmpty {
            throw Self.wrong(
                "\(name) takes no text; /\(name) \(text) sends all of it as a message")
        }
        return try await command.run(&self, text)
    }

    private func undo() throws -> String {
        guard chat.undo() else { throw Self.wrong("there is nothing to undo") }
        return "forgot the last question and its answer; \(counted(chat.questions, "question")) left"
    }

    private mutating func retry() throws -> String {
        guard chat.questions > 0 else { throw Self.wrong("there is nothing to retry") }
        wantsRetry = true
        return "answering the last question again"
    }

    /// Whether the last question is to be answered again; once.
    mutating func takeRetry() -> Bool {
        defer { wantsRetry = false }
        return wantsRetry
    }

    private func reset() async -> String {
        chat.reset()
        await apertus.clearCaches()
        return "forgot the conversation" + (chat.system == nil ? "" : "; the system message stays")
    }

    private func system(_ text: String) -> String {
        guard text.isEmpty else {
            chat.system = text == "off" ? nil : text
            return text == "off" ? "removed the system message" : "set the system message"
        }
        return chat.system.map { "the system message is: \($0)" } ?? "there is no system message"
    }

    private func think(_ text: String) throws -> String {
        guard ["", "on", "off"].contains(text) else {
            throw Self.wrong("/think \(text.prefix(40)): expected on or off")
        }
        if !text.isEmpty { chat.thinks = text == "on" }
        return "the model \(chat.thinks ? "deliberates" : "does not deliberate") before it answers"
    }

    private var stats: String {
        guard let last = chat.lastOutcome else { return "nothing has been answered yet" }
        let context = last.promptTokenIDs.count + last.tokenIDs.count
        return "\(last.summary); context \(context) of \(apertus.contextLength) tokens"
    }

    private mutating func save(_ text: String, replaces: Bool) throws -> String {
        guard !chat.messages.isEmpty else { throw Self.wrong("there is nothing to save") }
        let path = try path("/save", text)
        let isKnown = file?.resolvingSymlinksInPath() == path.resolvingSymlinksInPath()
        if FileManager.default.fileExists(atPath: path.path) {
            let type = try? FileManager.default.attributesOfItem(
                atPath: path.resolvingSymlinksInPath().path)[.type] as? FileAttributeType
            guard type == .typeRegular else {
                throw Self.wrong("\(path.relativePath): is there already, and is no file; give another name")
            }
            guard isKnown || replaces else {
                throw Self.wrong("\(path.relativePath): is there already; /save! \(text) replaces it")
            }
        }
        let report = Report.object([("messages", .list(chat.messages.map(\.report)))])
        try writeWhole(path) { try Data("\(report.written())\n".utf8).write(to: $0) }
        file = path
        return "saved \(counted(chat.messages.count, "message")) to \(path.relativePath)"
    }

    private mutating func load(_ text: String) throws -> String {
        let path = try path("/load", text)
        let messages = try RequestFiles.messages(path)
        try chat.load(messages)
        file = path
        var openEnd = ""
        if case .user = messages.last { openEnd = "; /retry answers the last" }
        return "loaded \(counted(messages.count, "message")) from \(path.relativePath)\(openEnd)"
    }

    private func path(_ command: String, _ text: String) throws -> URL {
        if !text.isEmpty { return URL(fileURLWithPath: (text as NSString).expandingTildeInPath) }
        guard let file else { throw Self.wrong("\(command) needs the name of a file") }
        return file
    }

    private static func wrong(_ words: String) -> ApertusError { ApertusError(.usage, words) }
}
